"""Makes the ledger's tables, and brings older ones up to date: tables and nullable columns are added, nothing is ever dropped.

Alembic was weighed: its migrations need a hand-written step for each column, on two databases, for a schema that only grows.
Here the declared tables are the schema, so an older ledger works with a newer program, and a newer ledger with an older one.
The platform's own tables are made where they are missing and never altered. Once under a lock: processes that make the same
tables at once break each other.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from filelock import FileLock
from sqlalchemy.exc import InvalidRequestError

from finetune_assets.registry.traffic import metadata  # the ledger's tables and the router's

PLATFORM = ("conversations", "messages", "ai_rlhf_feedback")
ADVISORY_LOCK = 5_417_220_026  # any number that nobody else uses in this Postgres


def prepare(engine: sa.Engine) -> None:
    """Tables and columns as declared. Raises SQLAlchemyError, OSError."""
    if engine.dialect.name == "sqlite":
        path = Path(engine.url.database or "ledger.db")
        with FileLock(path.with_name(f".{path.name}.lock")), engine.begin() as connection:
            connection.execute(sa.text("PRAGMA journal_mode = WAL"))  # the router writes while others read
            _bring_up(connection)
        return
    with engine.begin() as connection:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        _bring_up(connection)


def _bring_up(connection: sa.Connection) -> None:
    metadata.create_all(connection)
    inspector = sa.inspect(connection)
    quote = connection.dialect.identifier_preparer.quote
    for table in metadata.tables.values():
        if table.name in PLATFORM:
            continue
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name in there:
                continue
            if not column.nullable:
                raise InvalidRequestError(f"{table.name}.{column.name} was added later, so it must be nullable")
            kind = column.type.compile(connection.dialect)
            connection.execute(sa.text(f"ALTER TABLE {quote(table.name)} ADD COLUMN {quote(column.name)} {kind}"))
