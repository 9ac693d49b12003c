"""Reads sources into one frame a table: folders of exports (Parquet, JSONL, CSV) and databases, several at once.

A folder holds each table as a file (`messages.parquet`, `.jsonl`, `.ndjson`, `.csv`) or as a folder of files (`messages/*.csv`);
one with a `source.yaml` holds fine-tuning files (see `imports`).
Reading is tolerant by cell (see `cells`) and strict by file: what is damaged, missing or lacks a column stops with a SourceError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from finetune_assets.corpus.cells import typed
from finetune_assets.corpus.databases import read_database
from finetune_assets.corpus.files import SUFFIXES, read_file
from finetune_assets.corpus.imports import SETTINGS, read_folder
from finetune_assets.corpus.schema import FILE_NAMES, SOURCE, TABLES
from finetune_assets.errors import SourceError


@dataclass(frozen=True, eq=False)
class SourceTables:
    """The tables of all sources, one below the other; columns as `cells.typed` makes them, rows as they came."""

    conversations: pl.DataFrame
    messages: pl.DataFrame
    feedback: pl.DataFrame
    unknown_columns: dict[str, list[str]]


@dataclass(frozen=True)
class _Part:
    """One file or database table: `columns` are all it has, `frame` holds the declared ones."""

    table: str
    place: str
    columns: list[str]
    frame: pl.DataFrame


def read_source(sources: Sequence[str]) -> SourceTables:
    """Reads every table of every source (a folder, `sqlite:///…`, `postgresql://…`).

    Raises SourceError for a source that is missing, empty, damaged, or lacks a table or a column.
    """
    if not sources:
        raise SourceError("No source is given; set FINETUNE_SOURCE to a folder of exports or a database URL.")
    parts = [part for source in sources for part in _parts(source)]
    _require_columns(parts)
    frames = {table: pl.concat([typed(part.frame, table) for part in parts if part.table == table]) for table in TABLES}
    for table in ("conversations", "messages"):
        if frames[table].is_empty():
            where = ", ".join(part.place for part in parts if part.table == table)
            raise SourceError(f"The source is empty: table {table} has no rows ({where}). Export a period with conversations.")
    unknown = {
        table: sorted({name for part in parts if part.table == table for name in part.columns if name not in SOURCE[table]})
        for table in TABLES
    }
    return SourceTables(**frames, unknown_columns=unknown)


def _parts(source: str) -> Iterator[_Part]:
    if "://" in source:
        yield from (_Part(*found) for found in read_database(source))
        return
    folder = Path(source)
    if (folder / SETTINGS).is_file():
        yield from (_Part(*found) for found in read_folder(folder))
        return
    files = _files(folder)
    for table in TABLES:
        for file in files[table]:
            columns, frame = read_file(file, list(SOURCE[table]))
            yield _Part(table, str(file), columns, frame)


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of each table in a folder, sorted by name. Raises SourceError."""
    expected = ", ".join(_expected(table) for table in TABLES)
    if not folder.exists():
        raise SourceError(f"Source {folder} does not exist; set FINETUNE_SOURCE to a folder that holds {expected}.")
    if not folder.is_dir():
        raise SourceError(f"Source {folder} is a file; give the folder that holds {expected}.")
    found = {table: _table_files(folder, table) for table in TABLES}
    if not any(found.values()):
        raise SourceError(f"Source {folder} is empty: it holds none of {expected}.")
    missing = [table for table in TABLES if not found[table]]
    if missing:
        names = " and ".join(_expected(table) for table in missing)
        raise SourceError(f"Source {folder} lacks {', '.join(missing)}: expected {names}. Export it too, then run again.")
    return found


def _expected(table: str) -> str:
    return f"{table}{{{','.join(SUFFIXES)}}} or {table}/"


def _table_files(folder: Path, table: str) -> list[Path]:
    places: list[list[Path]] = []
    for name in FILE_NAMES[table]:
        places += [[path] for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
        if (folder / name).is_dir():
            inside = [path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
            places.append(sorted(path for path in inside if not path.name.startswith((".", "_"))))
    places = [files for files in places if files]
    if len(places) > 1:
        names = ", ".join(str(files[0].relative_to(folder)) for files in places)
        raise SourceError(f"Source {folder} holds table {table} more than once ({names}); keep one of them.")
    return places[0] if places else []


def _require_columns(parts: list[_Part]) -> None:
    problems: list[str] = []
    for part in parts:
        required = [name for name, column in SOURCE[part.table].items() if column.required]
        missing = [name for name in required if name not in part.columns]
        if missing:
            given = f"{part.place} (table {part.table}) lacks the column(s) {', '.join(missing)}"
            problems.append(f"{given}; required are {', '.join(required)}.")
    if problems:
        raise SourceError("\n".join(problems))
