"""No network: set before anything imports huggingface_hub. The tiny model that most trainings here start from."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; nobody changes its files."""
    from finetune_assets_tests.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("base"))
