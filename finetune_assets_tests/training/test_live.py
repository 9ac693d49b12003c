"""A real provider, asked for what costs nothing. Off unless a key and FINETUNE_LIVE=1 are set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_assets.storage import Store
from finetune_assets.training.openai_wire import OpenAIWire
from finetune_assets.training.remote import Connection, Notes
from finetune_assets.training.wire_profiles import PROFILES, client

pytestmark = pytest.mark.live


@pytest.mark.parametrize("provider", sorted(PROFILES))
def test_a_real_provider_answers(provider: str, tmp_path: Path) -> None:
    key = PROFILES[provider].key_env
    if os.environ.get("FINETUNE_LIVE") != "1" or not os.environ.get(key):
        pytest.skip(f"needs FINETUNE_LIVE=1 and {key}")
    connection = Connection(provider, os.environ.get("FINETUNE_LIVE_BASE_URL"))
    assert client(connection).fine_tuning.jobs.list(limit=1) is not None
    OpenAIWire(connection, Store(tmp_path), Notes()).shutdown_dates(["gpt-4o-mini-2024-07-18"])
