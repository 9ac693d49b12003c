"""All sources together: folders of exports (Parquet, JSONL, CSV) and databases. Rows are read when they are asked for.

Reading is tolerant by cell (see `cells`) and strict by part (see `parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.corpus.cells import no_rows
from finetune_assets.corpus.databases import Database, address, check_scheme
from finetune_assets.corpus.mapping import SourceMapping, read_mapping
from finetune_assets.corpus.parts import Part, folder_parts, postgres_parts, sqlite_parts
from finetune_assets.corpus.schema import TABLES
from finetune_assets.environment import Environment
from finetune_assets.errors import SourceError


@dataclass(frozen=True, eq=False)
class Tables:
    """Rows of the three tables, columns as `cells.typed` makes them."""

    conversations: pl.DataFrame
    messages: pl.DataFrame
    feedback: pl.DataFrame


class SourceTables:
    """All sources together. `parts` is cheap; the three frames hold everything, one part below the other, rows as they came."""

    def __init__(
        self, parts: Sequence[Part], databases: Sequence[Database] = (), leave_out: Callable[[Tables], Tables] | None = None
    ) -> None:
        self.parts, self._databases, self._leave_out = list(parts), list(databases), leave_out
        self.snapshots: dict[Path, Any] = {}  # of `index.look`, by home
        self.contacts: dict[str, frozenset[str]] = {}  # tenant -> its own public numbers and addresses, which scrubbing leaves
        self.regions: dict[str, tuple[str, ...]] = {}  # see `scrubbing.Regions`
        self._theirs: Callable[[pl.DataFrame], pl.Series] | None = None

    def without(
        self, leave_out: Callable[[Tables], Tables], theirs: Callable[[pl.DataFrame], pl.Series] | None = None
    ) -> SourceTables:
        """The same source less what a function leaves out; it gets whole conversations with all that is said of them. `theirs`
        knows such rows again where they are stored."""
        source = SourceTables(self.parts, self._databases, leave_out)
        source.contacts, source.regions, source._theirs = self.contacts, self.regions, theirs
        return source

    def left(self, tables: Tables) -> Tables:
        """Rows of the source less those that are left out."""
        return tables if self._leave_out is None else self._leave_out(tables)

    def erased(self, stored: pl.DataFrame) -> pl.Series:
        """Which stored conversations (conversation_id, user) are of people who are left out."""
        return pl.repeat(False, stored.height, eager=True) if self._theirs is None else self._theirs(stored)

    def close(self) -> None:
        """Gives connections back."""
        for database in self._databases:
            database.close()

    @property
    def conversations(self) -> pl.DataFrame:
        """Every conversation row."""
        return self._frame("conversations")

    @property
    def messages(self) -> pl.DataFrame:
        """Every message row."""
        return self._frame("messages")

    @property
    def feedback(self) -> pl.DataFrame:
        """Every feedback row."""
        return self._frame("feedback")

    @property
    def unknown_columns(self) -> dict[str, list[str]]:
        """Columns of each table that are not read."""
        for table in TABLES:
            self._frame(table)
        return self._read.unknown

    def of(self, table: str) -> list[Part]:
        """The parts of one table."""
        return [part for part in self.parts if part.table == table]

    def _frame(self, table: str) -> pl.DataFrame:
        return self._read[table] if self._leave_out is None else getattr(self._all, table)

    @cached_property
    def _read(self) -> _Read:
        return _Read(self)

    @cached_property
    def _all(self) -> Tables:
        return self.left(Tables(**{table: self._read[table] for table in TABLES}))


class _Read(dict[str, pl.DataFrame]):
    """Each table when it is first asked for."""

    def __init__(self, source: SourceTables) -> None:
        super().__init__()
        self.source, self.unknown = source, dict[str, list[str]]()

    def __missing__(self, table: str) -> pl.DataFrame:
        frames, unknown = [no_rows(table)], set[str]()
        try:
            for part in self.source.of(table):
                for frame, names in part.read():
                    frames.append(frame)
                    unknown.update(names)
        finally:
            self.source.close()
        whole = pl.concat(frames)
        if table != "feedback" and whole.is_empty():
            raise empty(table, self.source)
        self[table] = whole
        self.unknown[table] = sorted(unknown)
        return whole


def empty(table: str, source: SourceTables) -> SourceError:
    """What is said of a table without rows."""
    where = ", ".join(part.place for part in source.of(table)[:3]) or "no part"
    return SourceError(f"The source is empty: table {table} has no rows ({where}). Export a period with conversations.")


def read_source(sources: Sequence[str], mapping: SourceMapping | None = None, lookback_weeks: int | None = None) -> SourceTables:
    """Opens every source (a folder, `sqlite:///…`, `postgresql://…`); rows are read when they are asked for.

    Mapping and look-back follow FINETUNE_SOURCE_MAPPING and FINETUNE_LOOKBACK_WEEKS where they are not given. Raises SourceError
    for a source that is missing, empty, damaged, or lacks a table or a column.
    """
    if not sources:
        raise SourceError("No source is given; set FINETUNE_SOURCE to a folder of exports or a database URL.")
    environment = Environment.read()
    mapping = read_mapping(environment.source_mapping) if mapping is None else mapping
    lookback_weeks = environment.lookback_weeks if lookback_weeks is None else lookback_weeks
    mapping.check_used([shown(source) for source in sources])
    parts: list[Part] = []
    databases: list[Database] = []
    for source in sources:
        own = mapping.of(shown(source))
        if "://" not in source:
            parts += folder_parts(Path(source), own)
            continue
        database = Database(source)
        databases.append(database)
        kind = sqlite_parts if check_scheme(source) == "sqlite" else postgres_parts
        parts += kind(database, own, lookback_weeks)
    return SourceTables(parts, databases)


def shown(source: str) -> str:
    """A source as messages show it: without user and password."""
    return address(source) if "://" in source else source
