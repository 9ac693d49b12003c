"""Rows of fine-tuning files: JSON lines, JSON, CSV and Parquet, one by one with their line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import polars as pl

from finetune_assets.corpus.forms import Unusable
from finetune_assets.errors import SourceError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or row number from 1 on, row) of a file; a line that is no JSON comes as an Unusable. Raises SourceError."""
    if path.suffix.lower() not in SUFFIXES:
        raise SourceError(f"{path} is of no known kind; supported are {', '.join(SUFFIXES)}.")
    try:
        yield from _READERS[path.suffix.lower()](path)
    except OSError as error:
        cause = error.strerror or type(error).__name__
        raise SourceError(f"{path} cannot be read: {cause}. Check that it exists and that this user may read it.") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return Unusable("json_invalid", f"{type(error).__name__}{where}")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    value = _parsed(path.read_text(encoding="utf-8-sig", errors="replace"))
    if not isinstance(value, list):
        raise SourceError(f"{path} is no JSON list of rows. Give a list of objects, or one object a line as .jsonl.")
    yield from enumerate(cast("list[Any]", value), start=1)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                broken = None in row or None in row.values()
                problem = Unusable("not_an_object", "it has another number of fields than the header")
                yield reader.line_num, problem if broken else row
        except csv.Error as error:
            raise SourceError(f"{path}:{reader.line_num} is no well-formed CSV ({error}). Export it again.") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        frame = pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise SourceError(f"{path} is a damaged Parquet file ({type(error).__name__}). Copy or export it again.") from None
    yield from enumerate(frame.iter_rows(named=True), start=1)


_READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
