"""Phrases every domain shares, from `words/shared.yaml`, and the loader of the word tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .grammar import Slots


def load_words(name: str) -> dict[str, Any]:
    """One table of `words/`."""
    return yaml.safe_load((Path(__file__).parent / "words" / f"{name}.yaml").read_text(encoding="utf-8"))


COMMON: Slots = load_words("shared")
