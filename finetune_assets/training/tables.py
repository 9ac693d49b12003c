"""Dated tables in YAML: the shipped one beside this file, preceded by one of the same name in the folder of FINETUNE_TABLES."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import yaml

from finetune_assets.errors import SettingsError


class Entry(Protocol):
    """What every table has: whose model, and the beginning of its name."""

    @property
    def provider(self) -> str:
        """`openai`, `azure`, …"""
        ...

    @property
    def model(self) -> str:
        """Beginning of a model's name; empty: every model of the provider."""
        ...


Found = TypeVar("Found", bound=Entry)


def find(name: str, make: Callable[..., Found], rules: str, provider: str, model: str, folder: Path | None) -> Found | None:
    """The entry whose model is the longest beginning of this one's name; the user's table goes before the shipped one.

    `name`: the file's; `make`: an entry of its keys; `rules`: what an entry has, for the error. Raises SettingsError for a file
    that is no such table.
    """
    base = base_name(model)
    for file in [*([folder / name] if folder else []), Path(__file__).with_name(name)]:
        if not file.exists():
            continue
        entries = cast("list[Found]", _read(file, file.stat().st_mtime_ns, make, rules))
        fitting = [entry for entry in entries if entry.provider == provider and base.startswith(entry.model)]
        if fitting:
            return max(fitting, key=lambda entry: len(entry.model))
    return None


def base_name(model: str) -> str:
    """The base model in a tuned model's name: `ft:BASE:org:suffix:id`, at Azure `BASE.ft-…`, was made from BASE."""
    return model.split(":")[1] if model.startswith("ft:") else model.partition(".ft-")[0]


@lru_cache(maxsize=8)
def _read(file: Path, _modified: int, make: Callable[..., Any], rules: str) -> list[Any]:
    try:
        entries = cast("list[dict[str, Any]]", yaml.safe_load(file.read_text(encoding="utf-8")) or [])
        return [make(**entry) for entry in entries]
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        what = "prices" if file.stem == "prices" else "days"
        raise SettingsError(f"{file} is no table of {what} ({str(error).splitlines()[0]}); an entry has {rules}.") from None
