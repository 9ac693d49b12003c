"""One line of an examination, as `finetune doctor` prints it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    level: Level
    what: str
    text: str
