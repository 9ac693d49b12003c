"""Fixtures of the data-set tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_assets.assistants import Assistant
from finetune_assets_tests.dataset.small_corpus import Corpus, dental


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path / "home")


@pytest.fixture
def assistant() -> Assistant:
    return dental()
