"""Takes a person's texts and ids out of Dagster's own history: sample tables, Markdown and JSON that events and checks carry.

Works on the storage's tables through its own connections (SQLite, one file a run beside an index; Postgres, one database).
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import dagster as dg
import polars as pl
import sqlalchemy as sa
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable, AssetKeyTable, SqlEventLogStorageTable
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage

from finetune_assets.erasure import Needles

COLUMNS = (
    (SqlEventLogStorageTable, SqlEventLogStorageTable.c.event),
    (AssetKeyTable, AssetKeyTable.c.last_materialization),
    (AssetCheckExecutionsTable, AssetCheckExecutionsTable.c.evaluation_event),
)
BLOCK = 2_000  # rows read at a time


def forget(instance: dg.DagsterInstance, needles: Needles) -> int:
    """Replaces what the needles hit by `[erased]`; how many events changed. A table row that holds one loses all its texts."""
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage) or not needles:
        return 0
    raw = sorted({json.dumps(text)[1:-1] for text in needles.anything})  # as events are serialised
    return sum(_forget_in(connect, needles, raw) for connect in _connections(storage))


def _connections(storage: SqlEventLogStorage) -> Iterator[AbstractContextManager[sa.Connection]]:
    yield storage.index_connection()
    if isinstance(storage, SqliteEventLogStorage):
        yield from (storage.run_connection(run_id) for run_id in storage.get_all_run_ids())


def _forget_in(connect: AbstractContextManager[sa.Connection], needles: Needles, raw: list[str]) -> int:
    changed = 0
    with connect as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA secure_delete=ON")  # the old texts are overwritten on the disk
        present = set(sa.inspect(connection).get_table_names())
        for table, column in COLUMNS:
            if table.name not in present:
                continue
            last = -1
            while rows := connection.execute(
                sa.select(table.c.id, column).where(table.c.id > last).order_by(table.c.id).limit(BLOCK)
            ).all():
                last = rows[-1][0]
                frame = pl.DataFrame(
                    {"id": [row[0] for row in rows], "text": [row[1] for row in rows]}, schema_overrides={"text": pl.String}
                )
                hits = frame.filter(pl.col("text").str.contains_any(raw))
                for row_id, text in hits.iter_rows():
                    new = json.dumps(_cleaned(json.loads(text), needles))
                    if new != text:
                        connection.execute(sa.update(table).where(table.c.id == row_id).values({column.name: new}))
                        changed += 1
    return changed


def _cleaned(value: Any, needles: Needles) -> Any:
    """A serialised event without what the needles hit."""
    if isinstance(value, dict):
        if value.get("__class__") == "TableRecord" and any(needles.hit(cell) for cell in value["data"].values()):
            return {**value, "data": {k: needles.ERASED if isinstance(v, str) else v for k, v in value["data"].items()}}
        return {k: _cleaned(v, needles) for k, v in value.items()}
    if isinstance(value, list):
        return [_cleaned(item, needles) for item in value]
    return needles.replaced(value) if isinstance(value, str) else value
