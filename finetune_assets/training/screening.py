"""What may leave this machine: rows of tenants that allow it, in which the recognisers find nothing personal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import polars as pl

from finetune_assets.corpus.personal_data import DEFAULT_REGIONS, needs_look, residual
from finetune_assets.dataset.formats import read_lines
from finetune_assets.errors import DataError, SettingsError


def check_permission(assistant: str, allowed: bool, forbidding: Sequence[str]) -> None:
    """Raises SettingsError where the assistant forbids remote training, or tenants whose rows are in its data set do."""
    if not allowed:
        raise SettingsError(
            f"{assistant} has `remote.allowed: false`: nothing of it leaves this machine. Set `trainer: local`, or allow it."
        )
    if forbidding:
        raise SettingsError(
            f"The data set of {assistant} holds rows of {', '.join(forbidding)}, whose settings say `remote.allowed: false`. Add "
            "them to filters.exclude_tenants, or set `trainer: local`."
        )


def check_files(files: Iterable[Path], allow: frozenset[str] = frozenset(), regions: Sequence[str] = DEFAULT_REGIONS) -> None:
    """Looks through every text of frozen JSONL files once more; `allow`: the tenants' public contacts, which may be there;
    `regions`: countries of national phone numbers.

    Raises DataError with file, line and kind, never the value.
    """
    for path in files:
        texts = [(number, text) for number, row in enumerate(read_lines(path), 1) for text in _texts(row)]
        frame = pl.DataFrame(texts, schema={"line": pl.Int64, "text": pl.String}, orient="row")
        suspects = frame["text"].unique()
        suspects = suspects.filter(needs_look(suspects))
        kinds = {text: residual([text], regions, allow) for text in suspects}
        bad = {text: kind for text, kind in kinds.items() if kind}
        if bad:
            line, text = next((line, text) for line, text in texts if text in bad)
            total = sum((bad[text] for _, text in texts if text in bad), Counter[str]())
            raise DataError(
                f"{path.name}:{line} holds personal data ({', '.join(sorted(bad[text]))}; in all {sum(total.values())} values of "
                f"{', '.join(sorted(total))}). Nothing was sent. Build the data set again with the present rules."
            )


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in cast("Mapping[str, Any]", value).values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _texts(inner)
