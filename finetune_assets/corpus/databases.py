"""Reads the tables of a SQLite or Postgres database through ADBC, in Arrow record batches, read-only.

Postgres is read in one snapshot (repeatable read, read only), a week of a table at a time, so a role with SELECT is enough. A
relative `sqlite:///` path resolves against the project's root. Times without a zone are rejected row by row, as everywhere:
Postgres needs `timestamptz`, SQLite ISO texts with an offset. No message shows a password or a driver's own text.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

import polars as pl
import pyarrow as pa
from adbc_driver_manager import Error

from finetune_assets.corpus.cells import EARLIEST, LATEST, NO_TEXT
from finetune_assets.environment import ROOT, Environment
from finetune_assets.errors import SourceError

_ALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
"""How libpq finds out, in a minute, that a server is gone while rows are awaited."""
SUPPORTED = "a folder of exports, sqlite:///path, postgresql://user@host/database"
Columns = dict[str, str]
"""Name to type, as the database says it."""

_NO_TEXT_TYPES = re.compile(r"^(bytea|jsonb?|hstore|record)$|\[\]$")
_STATES = {
    "28": "it refuses the user or the password; check them in the URL",
    "3D": "the database does not exist; check its name in the URL",
    "42501": "the user may not read it; grant it: GRANT SELECT ON {table} TO the user",
    "42P01": "the table is gone: it was dropped or renamed while the source was read; run again",
    "42703": "a column is gone: the schema changed while the source was read; run again",
    "57014": "it took longer than FINETUNE_SOURCE_SECONDS={seconds:g}; raise it, or add an index on the table's time column",
    "57": "the server ended the connection; run again when it is up",
    "08": "the connection was lost; run again",
    "53": "the server has no connection or memory left; run again later",
}
_TEXTS = {
    "could not translate host name": "its host is unknown; check the URL",
    "Connection refused": "nothing answers at its host and port; start the server or check the URL",
    "No such file or directory": "nothing answers at its socket; start the server or check the URL",
    "timeout expired": "it did not answer in time; check that it is up",
    "authentication failed": _STATES["28"],
    "no password supplied": _STATES["28"],
    "does not exist": "the database or the role does not exist; check both in the URL",
    "server closed the connection": _STATES["57"],
    "terminating connection": _STATES["57"],
    "PQgetCopyData": _STATES["08"],
    "database is locked": "another program holds it; run again when that has ended",
}


def check_scheme(url: str) -> str:
    """`sqlite` or `postgresql`. Raises SourceError for another kind of URL, without showing it."""
    scheme = url.partition("://")[0]
    kind = scheme.partition("+")[0]
    if kind not in ("sqlite", "postgresql", "postgres"):
        raise SourceError(f"Source {scheme}://… is of no known kind; supported are {SUPPORTED}.")
    return "sqlite" if kind == "sqlite" else "postgresql"


def address(url: str) -> str:
    """A database's URL without user, password and parameters."""
    scheme = check_scheme(url)
    if scheme == "sqlite":
        return f"sqlite:///{sqlite_path(url)}"
    try:
        parts = urlsplit(url)
        host = f"{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}"
    except ValueError:
        raise SourceError(f"Source {scheme}://… is no well-formed database URL; supported are {SUPPORTED}.") from None
    socket = re.search(r"(?:^|&)host=([^&]+)", parts.query)
    return f"postgresql://{host or (unquote(socket[1]) if socket else '')}{parts.path}"


def sqlite_path(url: str) -> Path:
    """The file of a `sqlite:///` URL. Raises SourceError where it is not there."""
    path = Path(url.partition("://")[2].removeprefix("/").partition("?")[0])
    path = path if path.is_absolute() else ROOT / path
    if not path.is_file():
        raise SourceError(f"Source sqlite:///{path} does not exist; give the path of a SQLite file.")
    return path


class Database:
    """One connection, opened when it is first used; the reads up to `close` see one state of the database (Postgres)."""

    def __init__(self, url: str, seconds: float | None = None) -> None:
        """`seconds`: what one statement may take; default: FINETUNE_SOURCE_SECONDS."""
        self._connection: Any = None
        self._seconds = Environment.read().source_seconds if seconds is None else seconds
        self.url, self.kind, self.place = url, check_scheme(url), address(url)

    def close(self) -> None:
        """Gives the connection back; the next read opens another."""
        if self._connection is not None:
            with _quiet():
                self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        self.close()

    def tables(self) -> list[str]:
        """Names of tables and views, without system ones; those outside the search path as `schema.table`."""
        if self.kind == "sqlite":
            found = self._rows("SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%'")
        else:
            found = self._rows(
                "SELECT CASE WHEN pg_table_is_visible(c.oid) THEN c.relname ELSE n.nspname || '.' || c.relname END::text "
                "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f') "
                "AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg_toast%'"
            )
        return sorted(str(row[0]) for row in found)

    def columns(self, table: str) -> Columns:
        """Names and types of a table's columns."""
        if self.kind == "sqlite":
            return {
                str(row[0]): str(row[1]).lower()
                for row in self._rows(f"SELECT name, type FROM pragma_table_info({_text(table)})")
            }
        return {
            str(row[0]): str(row[1])
            for row in self._rows(
                "SELECT attname::text, format_type(atttypid, NULL) FROM pg_attribute "
                f"WHERE attrelid = to_regclass({_text(_quoted(table))}) AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
            )
        }

    def weeks(self, table: str, time: str) -> dict[str | None, int]:
        """Rows of each week (Monday, YYYY-MM-DD; None without a usable time) of a Postgres table by a `timestamptz` column."""
        column = f'"{_escaped(time)}"'
        week = f"to_char(date_trunc('week', {column} AT TIME ZONE 'UTC'), 'YYYY-MM-DD')"
        usable = f"{column} >= '{EARLIEST.isoformat()}' AND {column} < '{LATEST.isoformat()}'"
        query = f"SELECT CASE WHEN {usable} THEN {week} END, count(*) FROM {_quoted(table)} GROUP BY 1"
        return {row[0]: int(row[1]) for row in self._rows(query, table)}

    def read(self, table: str, columns: Columns, where: str = "") -> Iterator[pl.DataFrame]:
        """Frames of some columns: texts, and times with a zone as such; at least one, maybe without rows."""
        cells = self._cells(columns)
        query = f"SELECT {', '.join(cells) or '1'} FROM {_quoted(table)} AS t{f' WHERE {where}' if where else ''}"
        with self._cursor(table) as cursor:
            cursor.execute(query)
            reader = cursor.fetch_record_batch()
            yield self._decoded(pl.DataFrame(pl.from_arrow(reader.schema.empty_table())), columns)
            for batch in reader:
                yield self._decoded(pl.DataFrame(pl.from_arrow(batch)), columns)

    def _cells(self, columns: Columns) -> list[str]:
        names = [f'"{_escaped(name)}"' for name in columns]  # SQLite takes a "name" that is no column for a text, t."name" not
        if self.kind == "sqlite":
            # A letter before each cell, as bytes: the driver takes a column's type from its first rows and fails at others.
            mark = "CASE typeof({0}) WHEN 'null' THEN 'n' WHEN 'blob' THEN 'b' ELSE 't' || {0} END"
            return [f"CAST({mark.format(f't.{name}')} AS BLOB) AS {name}" for name in names]
        return [
            f"t.{name}" if type_.startswith("timestamp") else f"t.{name}::text AS {name}"
            for name, type_ in zip(names, columns.values(), strict=True)
        ]

    def _decoded(self, frame: pl.DataFrame, columns: Columns) -> pl.DataFrame:
        if self.kind == "sqlite":
            return pl.DataFrame([_unmarked(frame[name]) for name in columns]) if columns else frame.clear()
        odd = [name for name, type_ in columns.items() if _NO_TEXT_TYPES.search(type_)]
        return frame.select(list(columns)).with_columns(
            pl.when(pl.col(name).is_not_null()).then(pl.lit(NO_TEXT)).alias(name) for name in odd
        )

    def _rows(self, query: str, table: str = "") -> list[tuple[Any, ...]]:
        with self._cursor(table) as cursor:
            cursor.execute(query)
            return cursor.fetchall()

    @contextmanager
    def _cursor(self, table: str) -> Generator[Any]:
        """A cursor; what the driver raises becomes a SourceError."""
        cursor = None
        try:
            if self._connection is None:
                self._connection = self._connect()
            cursor = self._connection.cursor()
            yield cursor
        except (Error, OSError, pa.ArrowException) as error:
            self.close()
            of = f", table {table}," if table else ""
            raise SourceError(f"Source {self.place}{of} cannot be read: {_cause(error, table, self._seconds)}.") from None
        finally:
            if cursor is not None:
                with _quiet():
                    cursor.close()

    def _connect(self) -> Any:
        if self.kind == "sqlite":
            from adbc_driver_sqlite import dbapi  # noqa: PLC0415

            connection = dbapi.connect(f"file:{quote(str(sqlite_path(self.url)))}?mode=ro")
            with connection.cursor() as cursor:
                cursor.execute(f"PRAGMA busy_timeout = {int(self._seconds * 1000)}")
            return connection
        try:
            from adbc_driver_postgresql import dbapi  # noqa: PLC0415
        except ImportError:
            mend = "install it with `pip install finetune-assets[postgres]`"
            raise SourceError(f"Source {self.place} needs the package adbc-driver-postgresql; {mend}.") from None
        parts = urlsplit(self.url)
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        waits = {"connect_timeout": max(2, min(30, int(self._seconds))), **_ALIVE}
        query = "&".join([*filter(None, [parts.query]), *(f"{name}={n}" for name, n in waits.items() if name not in given)])
        connection = dbapi.connect(urlunsplit(parts._replace(scheme="postgresql", query=query)))
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            cursor.execute(f"SET LOCAL statement_timeout = {int(self._seconds * 1000)}")
        return connection


@contextmanager
def _quiet() -> Generator[None]:
    """For closing what may be broken already: the reason was told where it broke."""
    with suppress(Exception):
        yield


def week_window(time: str, week: str | None) -> str:
    """The SQL condition of one week's rows; None: rows without a usable time."""
    column = f'"{_escaped(time)}"'
    if week is None:
        return f"({column} IS NULL OR {column} < '{EARLIEST.isoformat()}' OR {column} >= '{LATEST.isoformat()}')"
    monday = datetime.datetime.fromisoformat(f"{week}T00:00:00+00:00")
    first, last = max(monday, EARLIEST), min(monday + datetime.timedelta(weeks=1), LATEST)
    return f"{column} >= '{first.isoformat()}' AND {column} < '{last.isoformat()}'"


def _cause(error: Exception, table: str, seconds: float) -> str:
    state = str(getattr(error, "sqlstate", None) or "")
    for length in (5, 2):
        if state[:length] in _STATES:
            return _STATES[state[:length]].format(table=table, seconds=seconds)
    known = next((mend for text, mend in _TEXTS.items() if text in str(error)), None)
    return known or f"{state or type(error).__name__}; check that it is up, well-formed and readable by this user"


def _unmarked(cells: pl.Series) -> pl.Series:
    texts = cells.cast(pl.String, strict=False)
    broken = texts.is_null()
    if broken.any():  # no UTF-8
        decoded = [bytes(cell).decode("utf-8", "replace") for cell in cells.filter(broken)]
        frame = pl.DataFrame({"text": texts, "row": pl.int_range(len(texts), eager=True)})
        fixed = pl.DataFrame({"row": broken.arg_true().cast(pl.Int64), "fixed": decoded}, schema_overrides={"fixed": pl.String})
        texts = frame.join(fixed, on="row", how="left", maintain_order="left").select(pl.coalesce("fixed", "text"))["fixed"]
    mark, rest = pl.col("cell").str.slice(0, 1), pl.col("cell").str.strip_prefix("t")
    found = pl.when(mark == "t").then(rest).when(mark == "b").then(pl.lit(NO_TEXT))
    return pl.DataFrame({"cell": texts}).select(found.alias(cells.name))[cells.name].cast(pl.String)


def _escaped(name: str) -> str:
    return name.replace('"', '""')


def _quoted(table: str) -> str:
    return ".".join(f'"{_escaped(part)}"' for part in table.split("."))


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
