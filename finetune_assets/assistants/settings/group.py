"""What all groups of settings share: the base class and small types."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


Count = Annotated[int, Field(ge=0)]

HERE = re.compile(r"https?://(localhost|127\.[\d.]+|\[::1\])(:\d+)?(/|$)")
"""Addresses on this machine: what is sent there has not left it."""


class Group(BaseModel):
    """Base of all groups: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_pattern(pattern: str) -> None:
    """Raises ValueError for what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
