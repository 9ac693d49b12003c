"""What the router saw, first in a file, then in the ledger: a reply is sent after its rows are in the file.

Each worker appends JSON lines to a segment of its own in `<home>/serving/journal/`. A thread closes the segment every
`interval`, writes its rows in one transaction, and removes it. So a killed worker loses nothing it has answered, a locked or
restarted database costs nothing but time, and what was left over is written by the next start. Rows that are there already are
left alone, which makes every step repeatable. A segment belongs to whoever holds its lock.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from finetune_assets.registry.traffic import ROUTER_TABLES

log = logging.getLogger(__name__)
INTERVAL = 0.05
"""Seconds between two transactions."""
TIMES = {"created_at", "started_at", "ended_at"}

Row = tuple[str, dict[str, Any]]
"""Table and values; times as ISO 8601 with their offset."""


class Journal:
    """One worker's segments."""

    def __init__(self, folder: Path, engine: sa.Engine, interval: float = INTERVAL) -> None:
        self.folder, self.engine, self.interval = folder, engine, interval
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.file = self._open()
        self.written = 0
        self.lost = 0
        self.problem: str | None = None
        self.backlog = 0
        self.ended = threading.Event()
        self.on_transfer: Callable[[], None] | None = None
        self.thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        """Begins to write to the ledger."""
        self.thread.start()

    def append(self, rows: list[Row]) -> bool:
        """Puts rows into the segment in one write; false where the disk does not take them (they are counted as lost)."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
        with self.lock:
            try:
                done = os.write(self.file, data)
                if done < len(data):  # half a line is no line: the reader stops there
                    os.ftruncate(self.file, os.fstat(self.file).st_size - done)
                    raise OSError("short write")
            except OSError as error:
                self.lost += len(rows)
                self.problem = f"{len(rows)} rows could not be kept: {error}"
                return False
            self.written += len(rows)
        return True

    def close(self) -> None:
        """Writes what is left and stops."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(timeout=20)
        with self.lock:
            os.close(self.file)
            with contextlib.suppress(FileNotFoundError):
                if self.path.stat().st_size == 0:
                    self.path.unlink()

    def _open(self) -> int:
        self.path = self.folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _run(self) -> None:
        while True:
            last = self.ended.wait(self.interval)
            try:
                self._rotate()
                self._transfer()
            except (SQLAlchemyError, OSError) as error:
                self.problem = f"the ledger cannot be written: {type(error).__name__}"
                log.warning("%s; rows wait in %s", self.problem, self.folder)
                if not last:
                    self.ended.wait(1.0)
            if self.on_transfer is not None:
                self.on_transfer()
            if last:
                return

    def _rotate(self) -> None:
        with self.lock:
            if os.fstat(self.file).st_size == 0:
                return
            old = self.file
            self.file = self._open()
            os.close(old)

    def _transfer(self) -> None:
        """Every segment that nobody holds, oldest first."""
        segments = sorted(path for path in self.folder.glob("*.jsonl") if path != self.path)
        self.backlog = len(segments)
        for path in segments:
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if not path.exists():
                    continue
                store(self.engine, read(file.read()))
                path.unlink()
        self.problem = None


def read(data: bytes) -> list[Row]:
    """The whole lines of a segment; one that a crash cut is left out."""
    rows: list[Row] = []
    for line in data.splitlines():
        try:
            table, values = json.loads(line)
        except ValueError:
            log.warning("A line of the journal that a crash cut is left out.")
            continue
        rows.append((table, values))
    return rows


def store(engine: sa.Engine, rows: list[Row]) -> None:
    """Writes rows in one transaction; what is there already stays. A conversation's end follows its newest message."""
    by_table: dict[str, list[dict[str, Any]]] = {}
    for table, values in rows:
        by_table.setdefault(table, []).append({k: _time(k, v, table) for k, v in values.items()})
    insert = postgresql.insert if engine.dialect.name == "postgresql" else sqlite.insert
    with engine.begin() as connection:
        for name, table in ROUTER_TABLES.items():
            values = by_table.get(name)
            if values:
                connection.execute(insert(table).on_conflict_do_nothing(), values)


def _time(name: str, value: Any, table: str) -> Any:
    if name not in TIMES or value is None:
        return value
    time_ = datetime.datetime.fromisoformat(value)
    return time_.astimezone(datetime.UTC).replace(tzinfo=None) if table in ("requests", "shadow_replies") else time_
