"""No network: set before anything imports huggingface_hub. A provider that is none, and a small training."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_assets.assistants.settings import Assistant
from finetune_assets.storage import Store
from finetune_assets.training import lifecycle
from finetune_assets.training.spec import request_for
from finetune_assets.training.trainer import TrainingRequest
from finetune_assets_tests.training import fake_provider, remote_request
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


@pytest.fixture(scope="session")
def request_(tmp_path_factory: pytest.TempPathFactory) -> TrainingRequest:
    """Forty short rows, one epoch, a tiny model; nobody changes its files."""
    from finetune_assets_tests.tiny_model import dialogues, make_tiny_model

    folder = tmp_path_factory.mktemp("request")
    base = make_tiny_model(folder / "base")
    for name, rows in (("train", dialogues(40, turns=2)), ("validation", dialogues(8, seed=9))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in rows), encoding="utf-8")
    settings = {"base_model": str(base), "hyperparameters": {"epochs": 1}, "budget": {"usd_per_hour": 3.6}}
    assistant = Assistant.model_validate({"name": "dental", "select": {"vertical": "dental"}, **settings})
    return request_for(assistant, folder, "f1", "key")[0]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture(autouse=True)
def trainers_are_closed() -> Iterator[None]:
    yield
    while remote_request.MADE:
        remote_request.MADE.pop().close()
