"""A real provider, asked for what costs nothing. Off unless a key (or AWS credentials) and FINETUNE_LIVE=1 are set.

    FINETUNE_LIVE=1 OPENAI_API_KEY=… python -m pytest -m live finetune_assets_tests/training/test_live.py
    FINETUNE_LIVE=1 AWS_PROFILE=… AWS_REGION=… python -m pytest -m live …

FINETUNE_LIVE_BASE_URL is the address of the provider whose key is set; Azure and openai_compatible have none of their own.
FINETUNE_LIVE_BUCKET, a bucket of yours, is listed, too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_assets.errors import ProviderError
from finetune_assets.storage import Store
from finetune_assets.training.openai_wire import OpenAIWire
from finetune_assets.training.remote import Connection, Notes
from finetune_assets.training.trainers import AWS
from finetune_assets.training.wire_profiles import PROFILES, client

pytestmark = pytest.mark.live
LIVE = os.environ.get("FINETUNE_LIVE") == "1"


@pytest.mark.parametrize("provider", sorted(PROFILES))
def test_a_real_provider_answers(provider: str, tmp_path: Path) -> None:
    key, url = PROFILES[provider].key_env, os.environ.get("FINETUNE_LIVE_BASE_URL")
    if not LIVE or not os.environ.get(key):
        pytest.skip(f"needs FINETUNE_LIVE=1 and {key}")
    if url is None and provider in ("azure", "openai_compatible"):
        pytest.skip("needs FINETUNE_LIVE_BASE_URL")
    connection = Connection(provider, url)
    assert client(connection).fine_tuning.jobs.list(limit=1) is not None
    OpenAIWire(connection, Store(tmp_path), Notes()).shutdown_dates(["gpt-4o-mini-2024-07-18"])


@pytest.mark.parametrize("provider", sorted(AWS))
def test_aws_answers(provider: str, tmp_path: Path) -> None:
    if not LIVE or not (os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE")):
        pytest.skip("needs FINETUNE_LIVE=1, AWS_REGION, and AWS_ACCESS_KEY_ID or AWS_PROFILE")
    trainer = AWS[provider](Connection(provider), Store(tmp_path), Notes()).hurried(30)
    with trainer.errors("listing jobs"):
        if provider == "bedrock":
            trainer.client("bedrock").list_model_customization_jobs(maxResults=1)
        else:
            trainer.client("sagemaker").list_training_jobs(MaxResults=1)
    with pytest.raises(ProviderError) as nobody:
        trainer.told("finetune-assets-no-such-job")
    assert nobody.value.status == 404  # as the trainer reads the real service's words
    if bucket := os.environ.get("FINETUNE_LIVE_BUCKET"):
        with trainer.errors("listing the bucket"):
            trainer.client("s3").list_objects_v2(Bucket=bucket, MaxKeys=1)
