"""What all groups of settings share: the base class and small types."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


Count = Annotated[int, Field(ge=0)]

HERE = re.compile(r"https?://(localhost|127\.[\d.]+|\[::1\])(:\d+)?(/|$)")
"""Addresses on this machine: what is sent there has not left it."""


def check_address(url: str) -> str:
    """The address itself. Raises ValueError for what is none over HTTP, and for one that holds a password: it is written down."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:  # a port or a bracket that is none
        raise ValueError(NO_ADDRESS) from None
    if not known:
        raise ValueError(NO_ADDRESS)
    if "@" in parts.netloc:
        raise ValueError("user and password stand in no address; name the environment variable that holds the key")
    return url


NO_ADDRESS = "an address begins with http:// or https:// and a host, e.g. https://HOST/v1"
Address = Annotated[str, AfterValidator(check_address)]
"""Where an API answers."""


class Group(BaseModel):
    """Base of all groups: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_pattern(pattern: str) -> None:
    """Raises ValueError for what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
