"""Reads the tables `conversations`, `messages` and `ai_rlhf_feedback` of a SQLite or Postgres database, read-only.

A relative `sqlite:///` path resolves against the project's root. Times without a zone are rejected row by row, as everywhere:
Postgres needs `timestamptz`, SQLite ISO texts with an offset. Passwords appear in no message.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from finetune_assets.corpus.cells import NO_TEXT
from finetune_assets.corpus.schema import FILE_NAMES, SOURCE, TABLES
from finetune_assets.environment import ROOT
from finetune_assets.errors import SourceError

SUPPORTED = "a folder of exports, sqlite:///path, postgresql://user@host/database"


def read_database(url: str) -> Iterator[tuple[str, str, list[str], pl.DataFrame]]:
    """Yields (table, place, names of all columns, frame of the declared ones as texts) of each table. Raises SourceError."""
    scheme = url.partition("://")[0]
    if scheme.partition("+")[0] not in ("sqlite", "postgresql"):
        raise SourceError(f"Source {scheme}://… is of no known kind; supported are {SUPPORTED}.")
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):  # its text holds the URL, password included
        raise SourceError(f"Source {scheme}://… is no well-formed database URL; supported are {SUPPORTED}.") from None
    name = parsed.render_as_string(hide_password=True)
    if scheme.startswith("sqlite"):
        parsed = _read_only(parsed)
    try:
        engine = sa.create_engine(parsed)
    except ImportError as error:
        mend = "install it with `pip install finetune-assets[postgres]`"
        raise SourceError(f"Source {name} needs the package {error.name}; {mend}.") from None
    try:
        with engine.connect() as connection:
            present = set(sa.inspect(connection).get_table_names()) | set(sa.inspect(connection).get_view_names())
            for table in TABLES:
                yield _table(connection, table, present, name)
    except SQLAlchemyError as error:
        cause = type(getattr(error, "orig", None) or error).__name__
        mend = "check that it is up, and that the user may read its tables"
        raise SourceError(f"Source {name} cannot be read ({cause}); {mend}.") from None
    finally:
        engine.dispose()


def _read_only(url: sa.URL) -> sa.URL:
    path = Path(url.database or "")
    path = path if path.is_absolute() else ROOT / path
    if not path.is_file():
        raise SourceError(f"Source sqlite:///{path} does not exist; give the path of a SQLite file.")
    return url.set(database=f"file:{quote(str(path))}", query={"mode": "ro", "uri": "true"})


def _table(connection: sa.Connection, table: str, present: set[str], place: str) -> tuple[str, str, list[str], pl.DataFrame]:
    names = [name for name in reversed(FILE_NAMES[table]) if name in present]
    if not names:
        there = ", ".join(sorted(present)) or "none"
        raise SourceError(f"Source {place} lacks the table {FILE_NAMES[table][-1]}; it has {there}.")
    columns = [column["name"] for column in sa.inspect(connection).get_columns(names[0])]
    wanted = [name for name in SOURCE[table] if name in columns]
    rows = connection.execute(sa.text(f'SELECT {", ".join(wanted) or "1"} FROM "{names[0]}"')).fetchall()
    cells = {name: [_as_text(row[i]) for row in rows] for i, name in enumerate(wanted)}
    return table, f"{place} {names[0]}", columns, pl.DataFrame(cells, schema=dict.fromkeys(wanted, pl.String))


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    return NO_TEXT if isinstance(value, bytes | list | dict) else str(value)
