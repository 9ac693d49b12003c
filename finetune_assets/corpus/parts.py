"""The parts of a source: a file of a folder, a table of a SQLite file, or a week of a Postgres table.

A folder holds each table as a file (`messages.parquet`, `.jsonl`, `.ndjson`, `.csv`) or as a folder of files (`messages/*.csv`).
Each part has a cheap state that tells whether it may have changed. What is damaged, missing or lacks a column stops with a
SourceError.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.corpus.cells import typed
from finetune_assets.corpus.databases import Columns, Database, sqlite_path, week_window
from finetune_assets.corpus.files import SUFFIXES, columns_of, read_batches, told
from finetune_assets.corpus.imports import SETTINGS, files_of, read_folder, read_origin
from finetune_assets.corpus.mapping import SourceTablesMapping, TableMapping, declared
from finetune_assets.corpus.schema import FILE_NAMES, REQUESTS, SOURCE, TABLES, UNKNOWN_WEEK
from finetune_assets.errors import SourceError

TIMES = {"conversations": "started_at", "messages": "created_at", "feedback": "created_at"}
"""The column that says in which week a row happened."""

State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Part:
    """One file, or one table (or week of it) of a database.

    An equal `state` (JSON) and `mapping` say that the rows are the same; with `always` they do not, and the part is read to
    find out.
    `digest` tells whether a file of another state holds the same bytes. `rows`: how many a database counted.
    """

    table: str
    key: str
    place: str
    state: State
    batches: Callable[[set[str]], Iterator[pl.DataFrame]]
    mapping: TableMapping = field(default_factory=TableMapping)
    always: bool = False
    digest: Callable[[], str] | None = None
    rows: int | None = None

    def read(self) -> Iterator[tuple[pl.DataFrame, list[str]]]:
        """Typed frames (see `cells.typed`), in the part's order, and the names of the columns met so far that are not read.

        Raises SourceError, at the end for JSON lines that lack a column.
        """
        seen: set[str] = set()
        rows = 0
        for raw in self.batches(seen):
            rows += len(raw)
            yield typed(declared(raw, self.mapping), self.table), self._unknown(seen)
        if rows or seen:
            _require(self.table, self.place, seen, self.mapping)

    def _unknown(self, seen: set[str]) -> list[str]:
        return sorted(seen - {self.mapping.source_name(name) for name in SOURCE[self.table]})


def _require(table: str, place: str, columns: set[str], mapping: TableMapping) -> None:
    wanted = [name for name, column in SOURCE[table].items() if column.required and name not in mapping.constants]
    required = [mapping.source_name(name) for name in wanted]
    missing = [name for name in required if name not in columns]
    if missing:
        raise SourceError(
            f"{place} (table {table}) lacks the column(s) {', '.join(missing)}; required are {', '.join(required)}. "
            "FINETUNE_SOURCE_MAPPING maps other names (`columns`), and says what a source has not (`constants: {NAME: null}`)."
        )
    if table == REQUESTS:
        _require_who(place, columns, mapping)


def _require_who(place: str, columns: set[str], mapping: TableMapping) -> None:
    """A table of requests says by a column whom to forget; one that only looks like it would be passed over in silence."""
    has = f"its columns are {', '.join(sorted(columns)) or 'none'}"
    missing = sorted(set(mapping.columns.values()) - columns)
    if missing:
        raise SourceError(
            f"{place} (table {REQUESTS}) lacks the column(s) {', '.join(missing)}, which FINETUNE_SOURCE_MAPPING names; {has}. "
            "Correct `columns` there."
        )
    ids = [mapping.source_name(name) for name in ("user_id", "conversation_id") if name not in mapping.constants]
    near = {name.casefold() for name in ids if name not in columns}
    alike = sorted(name for name in columns if name.strip().casefold() in near)
    if alike or not columns & set(ids):
        wrong = f"has {', '.join(alike)}, written otherwise than" if alike else "has no column"
        raise SourceError(
            f"{place} (table {REQUESTS}) {wrong} {' or '.join(ids)}, so its rows name nobody who can be forgotten; {has}. Rename "
            "one, or map it (FINETUNE_SOURCE_MAPPING, `columns`); fields of a CSV have commas between them."
        )


def _wanted(table: str, mapping: TableMapping) -> list[str]:
    return [mapping.source_name(name) for name in SOURCE[table] if name not in mapping.constants]


def _nested(table: str, mapping: TableMapping) -> frozenset[str]:
    """The source's names of columns that may hold lists and records."""
    return frozenset(mapping.source_name(name) for name, column in SOURCE[table].items() if column.kind == "aside")


# --- folders


def folder_parts(folder: Path, mapping: SourceTablesMapping) -> list[Part]:
    """The files of a folder. Raises SourceError, for all files that lack a column at once."""
    if (folder / SETTINGS).is_file():
        return _imported_parts(folder)
    parts, problems = list[Part](), list[str]()
    for table, files in _files(folder, mapping).items():
        for file in files:
            own = mapping.of(table)
            try:
                columns = columns_of(file)
                if columns is not None:
                    _require(table, str(file), set(columns), own)
            except SourceError as error:
                problems.append(str(error))
                continue
            parts.append(_file_part(table, file, own))
    if problems:
        raise SourceError("\n".join(problems))
    return parts


def _imported_parts(folder: Path) -> list[Part]:
    """The tables of a folder with a `source.yaml`: all of its files decide about each of them."""
    files = [folder / SETTINGS, *files_of(folder, read_origin(folder))]
    state = {os.path.relpath(path, folder): file_state(path) for path in files}  # a repository stands elsewhere
    tables: dict[str, pl.DataFrame] = {}

    def batches(table: str, seen: set[str]) -> Iterator[pl.DataFrame]:
        if not tables:
            tables.update({name: frame for name, _, _, frame in read_folder(folder)})
        seen.update(SOURCE[table])
        yield tables[table]

    return [Part(table, f"{folder} {table}", str(folder), state, partial(batches, table)) for table in TABLES]


def _file_part(table: str, file: Path, mapping: TableMapping) -> Part:
    wanted, nested = _wanted(table, mapping), _nested(table, mapping)
    return Part(
        table,
        str(file),
        str(file),
        file_state(file),
        lambda seen: read_batches(file, wanted, seen, nested),
        mapping,
        digest=lambda: file_digest(file),
    )


def file_state(file: Path) -> State:
    """Size and time of change: cheap, and different after any ordinary write."""
    with told(file):
        status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def file_digest(file: Path) -> str:
    """Digest of a file's bytes."""
    with told(file), file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _files(folder: Path, mapping: SourceTablesMapping) -> dict[str, list[Path]]:
    """The files of each table in a folder, sorted by name. Raises SourceError."""
    _check_folder(folder, mapping)
    found = {table: _table_files(folder, table, _names(table, mapping)) for table in TABLES}
    if not any(found.values()):
        raise _empty(folder, mapping)
    missing = [table for table in TABLES if not found[table]]
    if missing:
        names = " and ".join(_expected(table, mapping) for table in missing)
        raise SourceError(f"Source {folder} lacks {', '.join(missing)}: expected {names}. Export it too, then run again.")
    return found


def _check_folder(folder: Path, mapping: SourceTablesMapping) -> None:
    if not folder.exists():
        raise SourceError(f"Source {folder} does not exist; set FINETUNE_SOURCE to a folder that holds {_all(mapping)}.")
    if not folder.is_dir():
        raise SourceError(f"Source {folder} is a file; give the folder that holds {_all(mapping)}.")


def _empty(folder: Path, mapping: SourceTablesMapping) -> SourceError:
    return SourceError(f"Source {folder} is empty: it holds none of {_all(mapping)}.")


def _all(mapping: SourceTablesMapping) -> str:
    return ", ".join(_expected(table, mapping) for table in TABLES)


def _names(table: str, mapping: SourceTablesMapping) -> tuple[str, ...]:
    name = mapping.of(table).table
    return (name,) if name else FILE_NAMES[table]


def _expected(table: str, mapping: SourceTablesMapping) -> str:
    name = mapping.of(table).table or table
    return f"{name}{{{','.join(SUFFIXES)}}} or {name}/"


def _table_files(folder: Path, table: str, names: Sequence[str]) -> list[Path]:
    places: list[list[Path]] = []
    for name in names:
        places += [[path] for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
        if (folder / name).is_dir():
            inside = [path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
            places.append(sorted(filter(_visible, inside)))
    places = [files for files in places if files]
    if len(places) > 1:
        given = ", ".join(str(files[0].relative_to(folder)) for files in places)
        raise SourceError(f"Source {folder} holds table {table} more than once ({given}); keep one of them.")
    return places[0] if places else []


# --- databases


@dataclass(frozen=True)
class _Located:
    """A declared table, its name in a database, its columns there, and its mapping."""

    database: Database
    table: str
    name: str
    columns: Columns
    mapping: TableMapping


def _locate(database: Database, mapping: SourceTablesMapping) -> list[_Located]:
    """Every declared table; raises SourceError where one is not there or lacks a column."""
    there = database.tables()
    found, problems = list[_Located](), list[str]()
    for table in TABLES:
        names = [name for name in reversed(_names(table, mapping)) if name in there]
        if not names:
            problems.append(str(_lacking(database.place, _names(table, mapping)[-1], there)))
            continue
        located = _Located(database, table, names[0], database.columns(names[0]), mapping.of(table))
        try:
            _require(table, f"{database.place} {names[0]}", set(located.columns), located.mapping)
            found.append(located)
        except SourceError as error:
            problems.append(str(error))
    if problems:
        database.close()
        raise SourceError("\n".join(problems))
    return found


def sqlite_parts(database: Database, mapping: SourceTablesMapping, _lookback_weeks: int) -> list[Part]:
    """A part a table, all of one state: that of the file and of its write-ahead log."""
    path = sqlite_path(database.url)
    log = path.with_name(f"{path.name}-wal")
    state = {"file": file_state(path), "log": file_state(log) if log.is_file() else None}
    return [_table_part(located, state) for located in _locate(database, mapping)]


def postgres_parts(database: Database, mapping: SourceTablesMapping, lookback_weeks: int) -> list[Part]:
    """A part a week. Weeks in the look-back window behind a table's newest week are read each time, older ones counted."""
    parts: list[Part] = []
    for located in _locate(database, mapping):
        time = located.mapping.source_name(TIMES[located.table])
        if located.columns.get(time) != "timestamp with time zone":
            parts.append(_table_part(located, always=True))
            continue
        weeks = database.weeks(located.name, time)
        today = datetime.datetime.now(datetime.UTC).date()
        dated = [datetime.date.fromisoformat(week) for week in weeks if week]
        newest = max((day for day in dated if day <= today), default=today)  # a clock that runs ahead moves no window
        for week, rows in sorted(weeks.items(), key=lambda item: item[0] or ""):
            recent = week is None or datetime.date.fromisoformat(week) > newest - datetime.timedelta(weeks=lookback_weeks)
            parts.append(_table_part(located, {"rows": rows}, always=recent, week=(time, week), rows=rows))
    return parts


def _table_part(
    located: _Located,
    state: State | None = None,
    always: bool = False,
    week: tuple[str, str | None] | None = None,
    rows: int | None = None,
) -> Part:
    """`week`: the time column and the Monday, None for rows without a usable time."""
    columns, mapping = located.columns, located.mapping
    nested = _nested(located.table, mapping)  # read as text, jsonb too
    wanted = {
        column: "text" if column in nested else columns[column] for column in _wanted(located.table, mapping) if column in columns
    }
    where = week_window(*week) if week else ""
    label = f" week={week[1] or UNKNOWN_WEEK}" if week else ""
    place = f"{located.database.place} {located.name}"

    def batches(seen: set[str]) -> Iterator[pl.DataFrame]:
        seen.update(columns)
        return located.database.read(located.name, wanted, where)

    return Part(located.table, f"{place}{label}", place, state or {}, batches, mapping, always=always, rows=rows)


# --- requests to be forgotten


def request_parts(source: Path | Database, mapping: SourceTablesMapping) -> list[Part]:
    """The parts of the table of erasure requests; none where a source has no such table.

    Raises SourceError where a source is not there, a mapped table is not, or one is there that would not be read.
    """
    own, [name] = mapping.of(REQUESTS), _names(REQUESTS, mapping)
    if isinstance(source, Path):
        return [_file_part(REQUESTS, file, own) for file in _request_files(source, name, mapping)]
    there = source.tables()
    if name not in there:
        if not any(one in there for table in TABLES for one in _names(table, mapping)):
            raise _lacking(source.place, _names("conversations", mapping)[-1], there)
        _check_no_requests(source.place, there, name, mapped=own.table is not None)
        return []
    columns = source.columns(name)
    _require(REQUESTS, f"{source.place} {name}", set(columns), own)
    return [_table_part(_Located(source, REQUESTS, name, columns, own))]


def _request_files(folder: Path, name: str, mapping: SourceTablesMapping) -> list[Path]:
    _check_folder(folder, mapping)
    imported = (folder / SETTINGS).is_file()  # no export: what is mapped for every source is not its
    own = mapping.of(REQUESTS)
    files = _table_files(folder, REQUESTS, [name])
    for file in files:
        columns = columns_of(file)
        if columns is not None:
            _require(REQUESTS, str(file), set(columns), own)
    if files:
        return files
    if not imported and not any(_table_files(folder, table, _names(table, mapping)) for table in TABLES):
        raise _empty(folder, mapping)
    with told(folder):
        if (folder / name).is_dir() and not any(map(_visible, (folder / name).iterdir())):
            return []  # nobody has asked so far
        there = sorted(path.name for path in folder.iterdir())
    expected = _expected(REQUESTS, mapping)
    _check_no_requests(str(folder), there, name, own.table is not None and not imported, expected)
    return []


def _visible(path: Path) -> bool:
    return not path.name.startswith((".", "_"))


def _check_no_requests(place: str, there: Sequence[str], name: str, mapped: bool, expected: str = "") -> None:
    """A table of requests that is there under nearly its name, or is said to be there, was not meant to be passed over."""
    if mapped:
        raise _lacking(
            place,
            f"{name}, which FINETUNE_SOURCE_MAPPING names as {REQUESTS}",
            there,
            " Correct `table` there; where not every source has it, write it under `sources`.",
        )
    alike = [one for one in there if f"{one.casefold()}.".startswith(f"{name.casefold()}.")]
    if alike:
        raise SourceError(
            f"Source {place} holds {', '.join(alike)}, which is not read as the table of requests to be forgotten: expected is "
            f"{expected or name}. Rename it, or map it (FINETUNE_SOURCE_MAPPING, {REQUESTS}: `table`)."
        )


def _lacking(place: str, name: str, there: Sequence[str], mend: str = "") -> SourceError:
    return SourceError(f"Source {place} lacks the table {name}; it has {', '.join(there[:50]) or 'none'}.{mend}")
