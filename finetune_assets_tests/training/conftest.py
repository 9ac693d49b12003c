"""No network: set before anything imports huggingface_hub. And a provider that is none."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator

import pytest

from finetune_assets.training import lifecycle
from finetune_assets_tests.training import fake_provider
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.fake_provider.process import KEY

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def provider_process() -> Iterator[FakeProvider]:
    with fake_provider.start() as running:
        yield running


@pytest.fixture
def fake(provider_process: FakeProvider, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeProvider]:
    """The stand-in, fresh, where the providers' own variables point; all that was said was by the published description.

    The day is before the last jobs of the shipped table, whatever day it is.
    """
    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 11, 20))
    provider_process.reset()
    monkeypatch.setenv("OPENAI_BASE_URL", provider_process.url)
    for name in ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "NEBIUS_API_KEY", "OPENAI_COMPATIBLE_API_KEY"):
        monkeypatch.setenv(name, KEY)
    yield provider_process
    assert provider_process.state()["violations"] == []
