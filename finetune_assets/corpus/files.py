"""Reads one export file: Parquet with its own types, CSV and JSON lines as texts.

`read_file(path, wanted)` gives the names of all columns in the file, and a frame with those of them that are wanted.
Messages never quote the file's content: it may be personal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.corpus.cells import NO_TEXT
from finetune_assets.errors import SourceError

Contents = tuple[list[str], pl.DataFrame]


def read_file(path: Path, wanted: list[str]) -> Contents:
    """All column names of a file and the frame of the wanted ones. Raises SourceError for a damaged file."""
    try:
        size = path.stat().st_size
        return _READERS[path.suffix.lower()](path, wanted, size)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SourceError(f"{path} cannot be read: {reason}. Check that it exists and that this user may read it.") from None


def _parquet(path: Path, wanted: list[str], size: int) -> Contents:
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(size - 4, 0))
        tail = file.read(4)
    if size < 12 or head != b"PAR1" or tail != b"PAR1":
        cause = "it is cut off (the closing mark PAR1 is missing)" if head == b"PAR1" else "it does not start with PAR1"
        raise SourceError(f"{path} is no whole Parquet file: {cause}, {size:,} bytes. Copy or export it again.")
    try:
        columns = list(pl.read_parquet_schema(path))
        return columns, pl.read_parquet(path, columns=[name for name in wanted if name in columns])
    except OSError:
        raise
    except BaseException as error:  # a damaged page makes polars panic, which is no Exception
        if not isinstance(error, pl.exceptions.PolarsError | ValueError) and type(error).__name__ != "PanicException":
            raise
        cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise SourceError(f"{path} is a damaged Parquet file ({cause}), {size:,} bytes. Copy or export it again.") from None


def _csv(path: Path, wanted: list[str], size: int) -> Contents:
    if size == 0:
        raise SourceError(f"{path} is empty, without even a header line. Export it again; a table without rows keeps its header.")
    try:
        columns = pl.read_csv(path, n_rows=0, infer_schema=False, encoding="utf8-lossy").columns
        kept = [name for name in wanted if name in columns]
        frame = pl.read_csv(path, columns=kept, infer_schema=False, encoding="utf8-lossy") if kept else pl.DataFrame()
    except pl.exceptions.PolarsError as error:
        hint = "a line has more fields than the header" if "fields" in str(error) else type(error).__name__
        mend = "Export it with a comma between fields and texts in quotes"
        raise SourceError(f"{path} is no well-formed CSV ({hint}). {mend}.") from None
    return columns, frame


def _json_lines(path: Path, wanted: list[str], size: int) -> Contents:
    known: dict[str, list[str | None]] = {name: [] for name in wanted}
    columns: dict[str, None] = {}
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _record(path, number, line)
            columns.update(dict.fromkeys(row))
            for name, cells in known.items():
                cells.append(_as_text(row.get(name)))
    found = list(columns) if columns else list(known)  # a table without rows has no columns to miss
    kept = [name for name in wanted if name in found]
    return found, pl.DataFrame({name: known[name] for name in kept}, schema=dict.fromkeys(kept, pl.String))


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        cause = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise SourceError(f"{path}:{number} is no JSON ({cause}); is the file cut off? Copy or export it again.") from None
    if not isinstance(row, dict):
        raise SourceError(f"{path}:{number} is a JSON {type(row).__name__}, not an object; each line holds one row as an object.")
    return row  # pyright: ignore[reportUnknownVariableType]


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _digits(value)
    return NO_TEXT


def _digits(value: float) -> str:
    try:
        return str(int(value)) if value == int(value) and abs(value) < 2**53 else str(value)
    except (ValueError, OverflowError):  # NaN, infinity, more digits than Python prints
        return "nan" if value != value else NO_TEXT  # noqa: PLR0124


_READERS: dict[str, Callable[[Path, list[str], int], Contents]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
}
SUFFIXES: tuple[str, ...] = tuple(_READERS)
