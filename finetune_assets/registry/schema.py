"""Makes the ledger's tables, and brings older ones up to date: tables, nullable columns, indexes are added, nothing is dropped.

Alembic compares the declared tables with the database and carries out what only adds. There are no numbered scripts: the schema
only grows, so the declared tables are the schema, an older ledger works with a newer program, and a newer ledger with an older
one. The platform's own tables are made where they are missing and never altered. Once under a lock: processes that make the same
tables at once break each other. What a ledger has been brought up to is a row of `ledger_schema`, so that opening it asks once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock
from sqlalchemy.exc import InvalidRequestError, SQLAlchemyError

from finetune_assets.registry.tables import ledger_schema, now, rollouts
from finetune_assets.registry.traffic import metadata  # the ledger's tables and the router's

PLATFORM = ("conversations", "messages", "ai_rlhf_feedback")
ADVISORY_LOCK = 5_417_220_026  # any number that nobody else uses in this Postgres


def prepare(engine: sa.Engine) -> None:
    """Tables, columns and indexes as declared. Raises SQLAlchemyError, OSError."""
    if _is_prepared(engine):
        return
    if engine.dialect.name == "sqlite":
        path = Path(engine.url.database or "ledger.db")
        with FileLock(path.with_name(f".{path.name}.lock")), engine.begin() as connection:
            connection.execute(sa.text("PRAGMA journal_mode = WAL"))  # the router writes while others read
            _bring_up(connection)
        return
    with engine.begin() as connection:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        _bring_up(connection)


def fingerprint() -> str:
    """Of the declared tables."""
    columns = (
        f"{table.name}.{column.name} {column.type!r} {column.nullable}"
        for table in metadata.sorted_tables
        for column in table.columns
    )
    indexes = (f"{table.name} {index.name}" for table in metadata.sorted_tables for index in table.indexes)
    return hashlib.sha256("\n".join([*columns, *sorted(indexes)]).encode()).hexdigest()[:20]


def _is_prepared(engine: sa.Engine) -> bool:
    try:
        with engine.connect() as connection:
            return _knows(connection, fingerprint())
    except SQLAlchemyError:  # no such table yet; a database that cannot be reached says so in the next step
        return False


def _knows(connection: sa.Connection, declared: str) -> bool:
    found = sa.select(ledger_schema.c.fingerprint).where(ledger_schema.c.fingerprint == declared)
    return connection.execute(found).first() is not None


def _bring_up(connection: sa.Connection) -> None:
    declared, old = fingerprint(), sa.inspect(connection).has_table(rollouts.name)
    metadata.create_all(connection)
    if _knows(connection, declared):
        return  # another process was first
    if old:
        _add_to_tables(connection)
    connection.execute(sa.insert(ledger_schema).values(fingerprint=declared, prepared_at=now()))


def _add_to_tables(connection: sa.Connection) -> None:
    """Columns and indexes that the tables of an older ledger lack: what of alembic's changes adds."""
    from alembic.autogenerate import produce_migrations  # noqa: PLC0415
    from alembic.migration import MigrationContext  # noqa: PLC0415
    from alembic.operations import Operations, ops  # noqa: PLC0415

    def is_declared(name: str | None, kind: str, _: Any) -> bool:
        return kind != "table" or name in metadata.tables

    context = MigrationContext.configure(connection, opts={"include_name": is_declared, "compare_type": False})
    wanted = produce_migrations(context, metadata).upgrade_ops
    tables = [table for table in (wanted.ops if wanted else ()) if isinstance(table, ops.ModifyTableOps)]
    for change in (change for table in tables if table.table_name not in PLATFORM for change in table.ops):
        if isinstance(change, ops.AddColumnOp) and not change.column.nullable:
            raise InvalidRequestError(f"{change.table_name}.{change.column.name} was added later, so it must be nullable")
        if isinstance(change, (ops.AddColumnOp, ops.CreateIndexOp)):
            Operations(context).invoke(change)
