"""What the recognisers still find in the files of a frozen data set: nothing, or it is not trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import polars as pl

from finetune_assets.corpus.personal_data import DEFAULT_REGIONS, may_hold, residual
from finetune_assets.corpus.scrubbing import regions_of
from finetune_assets.dataset.formats import FILES, FileSpec
from finetune_assets.dataset.selection import NOTHING, Left


def personal_data_left(folder: Path, left: Left = NOTHING) -> tuple[list[str], int]:
    """Places (file:line kind) where a value is left, never the value; and how many lines were looked at.

    `left`: what may be there. System messages and `tools` are left out: they are the assistant's settings, not what
    people said.
    """
    found, looked = list[str](), 0
    for spec in FILES:
        lines = pl.Series((folder / spec.name).read_text(encoding="utf-8").split("\n")[:-1], dtype=pl.String)
        looked += len(lines)
        regions = _regions(folder, spec, left) if left.regions else {}
        for number in may_hold(lines).arg_true():
            kinds = residual(_texts(json.loads(lines[number])), regions.get(number, DEFAULT_REGIONS), left.contacts)
            found += [f"{spec.name}:{number + 1} {kind}" for kind in sorted(kinds)]
    return found, looked


def _regions(folder: Path, spec: FileSpec, left: Left) -> dict[int, tuple[str, ...]]:
    """Line (from 0) to the countries of its tenant's phone numbers."""
    lineage = pl.read_parquet(folder / spec.lineage, columns=["split", "line", "tenant_id", "vertical"])
    rows = lineage.filter(pl.col("split").is_in(spec.splits)).select("line", "tenant_id", "vertical").unique().rows()
    return {line: regions_of(left.regions, tenant, vertical) for line, tenant, vertical in rows}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        turn = cast("dict[str, Any]", value)
        if turn.get("role") != "system":
            for key, inner in turn.items():
                if key != "tools":
                    yield from _texts(inner)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value
