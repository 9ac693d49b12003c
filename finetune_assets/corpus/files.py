"""Reads one export file in batches: Parquet with its own types, CSV and JSON lines as texts.

`columns_of(path)` names all columns, `read_batches(path, wanted)` yields frames with those of them that are wanted.
Messages never quote the file's content: it may be personal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_assets.corpus.cells import NO_TEXT
from finetune_assets.errors import SourceError

BATCH_ROWS = 100_000


def columns_of(path: Path) -> list[str] | None:
    """All column names of a file; None for JSON lines, where each line has its own. Raises SourceError for a damaged file."""
    with told(path):
        return _READERS[path.suffix.lower()][0](path)


def read_batches(path: Path, wanted: list[str], seen: set[str], nested: frozenset[str] = frozenset()) -> Iterator[pl.DataFrame]:
    """Frames of the wanted columns, in file order; at least one, maybe without rows. All columns' names go to `seen`, JSON
    lines' while they are read. Lists and records in columns of `nested` stay JSON. Raises SourceError for a damaged file."""
    reader = _READERS[path.suffix.lower()]
    with told(path):
        seen.update(reader[0](path) or ())
        yield from reader[1](path, wanted, seen) if reader[1] is not _json_lines else _json_lines(path, wanted, seen, nested)


@contextmanager
def told(path: Path) -> Generator[None]:
    """Makes a SourceError of what the system says of a file that is away, or may not be read."""
    try:
        yield
    except OSError as error:
        if error.errno is None and path.suffix.lower() == ".parquet":  # pyarrow's own: no system call failed
            raise _damaged(path, error) from None
        reason = error.strerror or type(error).__name__
        raise SourceError(f"{path} cannot be read: {reason}. Check that it exists and that this user may read it.") from None


def _damaged(path: Path, error: BaseException) -> SourceError:
    cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return SourceError(f"{path} is a damaged Parquet file ({cause}), {path.stat().st_size:,} bytes. Copy or export it again.")


def _parquet_columns(path: Path) -> list[str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(size - 4, 0))
        tail = file.read(4)
    if size < 12 or head != b"PAR1" or tail != b"PAR1":
        cause = "it is cut off (the closing mark PAR1 is missing)" if head == b"PAR1" else "it does not start with PAR1"
        raise SourceError(f"{path} is no whole Parquet file: {cause}, {size:,} bytes. Copy or export it again.")
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _parquet(path: Path, wanted: list[str], seen: set[str]) -> Iterator[pl.DataFrame]:
    kept = [name for name in wanted if name in seen]
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            nothing = pa.Table.from_batches([], schema=file.schema_arrow)  # `empty_table` imports pandas, which takes 0.4 s
            yield pl.DataFrame(pl.from_arrow(nothing.select(kept)))
            for batch in file.iter_batches(BATCH_ROWS, columns=kept, use_threads=False):
                yield pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch])))
    except (pa.ArrowException, pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None
    except BaseException as error:  # polars panics on what it does not know; a panic is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise _damaged(path, error) from None


def _csv_columns(path: Path) -> list[str]:
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty, without even a header line. Export it again; a table without rows keeps its header.")
    try:
        columns = pl.read_csv(path, n_rows=0, infer_schema=False, encoding="utf8-lossy").columns
    except pl.exceptions.PolarsError as error:
        raise _no_csv(path, error) from None
    check_separator(path, columns)
    return columns


def check_separator(path: Path, columns: Sequence[str]) -> None:
    """Raises SourceError where the only column of a CSV is a header with another separator."""
    other = next((sign for sign in ";\t|" if len(columns) == 1 and sign in columns[0]), None)
    if other:
        raise SourceError(f"{path} separates its fields by {other!r}. Export it with a comma between fields and texts in quotes.")


def _no_csv(path: Path, error: BaseException) -> SourceError:
    hint = "a line has more fields than the header" if "fields" in str(error) else type(error).__name__
    return SourceError(f"{path} is no well-formed CSV ({hint}). Export it with a comma between fields and texts in quotes.")


def _csv(path: Path, wanted: list[str], seen: set[str]) -> Iterator[pl.DataFrame]:
    kept = [name for name in wanted if name in seen]
    yield pl.DataFrame(schema=dict.fromkeys(kept, pl.String))
    if not kept:
        return
    try:
        rows = pl.scan_csv(path, infer_schema=False, encoding="utf8-lossy").select(kept)
        yield from rows.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True)
    except pl.exceptions.PolarsError as error:
        raise _no_csv(path, error) from None


def _json_columns(path: Path) -> None:
    with path.open("rb"):
        pass


def _json_lines(path: Path, wanted: list[str], seen: set[str], nested: frozenset[str] = frozenset()) -> Iterator[pl.DataFrame]:
    cells: dict[str, list[str | None]] = {name: [] for name in wanted}
    rows = 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _record(path, number, line)
            seen.update(row)
            rows += 1
            for name, column in cells.items():
                cell = row.get(name)
                column.append(_as_text(cell if name not in nested or not isinstance(cell, list | dict) else json.dumps(cell)))
            if rows % BATCH_ROWS == 0:
                yield _frame(cells)
    if rows % BATCH_ROWS or not rows:
        yield _frame(cells)


def _frame(cells: dict[str, list[str | None]]) -> pl.DataFrame:
    frame = pl.DataFrame(cells, schema=dict.fromkeys(cells, pl.String))
    for column in cells.values():
        column.clear()
    return frame


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


_Batches = Callable[[Path, list[str], set[str]], Iterator[pl.DataFrame]]
_READERS: dict[str, tuple[Callable[[Path], list[str] | None], _Batches]] = {
    ".parquet": (_parquet_columns, _parquet),
    ".jsonl": (_json_columns, _json_lines),
    ".ndjson": (_json_columns, _json_lines),
    ".csv": (_csv_columns, _csv),
}
SUFFIXES: tuple[str, ...] = tuple(_READERS)
