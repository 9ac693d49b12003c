"""What the router saw, first in a file, then in the ledger: a reply is sent after its rows are in the file.

Each worker appends JSON lines to a segment of its own in `<home>/serving/journal/` and begins a new one every `interval`. The
writer, a process of its own, brings closed segments to the ledger, so that no database call takes time from a chat. A killed
worker loses nothing it has answered, a database that takes no rows costs nothing but time, and what was left over is written
after the next start. A segment belongs to whoever holds its lock. Where the disk takes nothing, a chat's rows wait in memory
until it does, as many as fit there; what does not fit is counted as lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_assets.serving import jsons

log = logging.getLogger(__name__)
INTERVAL = 0.05
"""Seconds after which a segment with rows is closed."""
MOST_HELD = 64 << 20
"""Bytes that wait in memory while the disk is full: some 40,000 chats."""
PROBE = b" " * 4096
"""Tells whether a disk takes rows again."""
MOST_WORKERS = 64
"""Of one router (`finetune serve --workers`)."""
LATE = 10.0
"""Seconds that rows may wait for the ledger before the worker is not ready."""

Row = tuple[str, dict[str, Any]]
"""Table and values; times as ISO 8601 with their offset."""


class Journal:
    """One worker's segments."""

    def __init__(self, folder: Path, interval: float = INTERVAL) -> None:
        self.folder, self.interval = folder, interval
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.path, self.file = self._open()
        self.held: deque[tuple[int, bytes]] = deque()
        self.held_bytes = 0
        self.lost = 0
        self.refused: str | None = None
        self.backlog = 0
        self.first: tuple[str, float] | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        """Begins to close segments."""
        self.thread.start()

    @property
    def problem(self) -> str | None:
        """Why rows wait, or are lost."""
        if self.refused:
            waiting = sum(rows for rows, _ in self.held)
            return f"the journal cannot be written ({self.refused}): {waiting} rows wait in memory, {self.lost} are lost"
        late = time.monotonic() - self.first[1] if self.first else 0.0
        return f"rows wait for the ledger since {late:.0f} s" if late > LATE else None

    def append(self, rows: list[Row], hold: bool = False) -> bool:
        """Puts rows into the segment in one write. False where the disk does not take them, and they are not kept.

        `hold`: then they are kept in memory and written when it does; only where there is no room for them they are lost.
        """
        data = b"\n".join([*map(jsons.dumps, rows), b""])
        with self.lock:
            if self._write(data):
                return True
            if hold and self.held_bytes + len(data) <= MOST_HELD:
                self.held.append((len(rows), data))
                self.held_bytes += len(data)
                return True
            self.lost += len(rows) if hold else 0
        return False

    def _write(self, data: bytes) -> bool:
        try:
            done = os.write(self.file, data)
            if done < len(data):  # half a line is no line: the reader stops there
                os.ftruncate(self.file, os.fstat(self.file).st_size - done)
                raise OSError(errno.ENOSPC, "short write")
        except OSError as error:
            if self.refused is None:
                log.error("The journal in %s cannot be written: %s. Chats go on, their rows wait in memory.", self.folder, error)
            self.refused = str(error)
            return False
        return True

    def _catch_up(self) -> None:
        """Writes what waits in memory."""
        with self.lock:
            while self.held and self._write(self.held[0][1]):
                self.held_bytes -= len(self.held.popleft()[1])
            if self.refused and not self.held and self._write(PROBE):
                os.ftruncate(self.file, os.fstat(self.file).st_size - len(PROBE))
                log.warning("The journal in %s is written again.", self.folder)
                self.refused = None

    def close(self) -> None:
        """Lets go of the last segment."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(timeout=5)
        self._catch_up()
        if self.held:
            log.error("%d rows are lost: the journal could not be written before the end.", sum(rows for rows, _ in self.held))
        with self.lock:
            if os.fstat(self.file).st_size == 0:
                self.path.unlink(missing_ok=True)
            os.close(self.file)

    def _open(self) -> tuple[Path, int]:
        while True:
            path = self.folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:
                return path, file
            os.close(file)  # the reader was between the two calls: it took the empty segment for a finished one, and removed it

    def _run(self) -> None:
        while not self.ended.wait(self.interval):
            try:
                self._catch_up()
                self._rotate()
                self._look()
            except OSError as error:  # no new segment: the old one is written on
                self.refused = str(error)
                log.warning("The journal in %s cannot begin a new segment: %s", self.folder, error)
                self.ended.wait(1.0)

    def _rotate(self) -> None:
        with self.lock:
            if os.fstat(self.file).st_size == 0:
                return
            old = self.file
            self.path, self.file = self._open()
            os.close(old)

    def _look(self) -> None:
        """How much waits for the writer, and for how long the same segment has been the first: clocks are set, files are not."""
        others = [entry for entry in os.scandir(self.folder) if entry.name.endswith(".jsonl") and entry.name != self.path.name]
        if len(others) <= MOST_WORKERS:  # the segment that another worker has open holds nothing while nobody asks it
            others = [entry for entry in others if _holds(entry)]
        waiting = sorted(entry.name for entry in others)
        self.backlog = len(waiting)
        if not waiting:
            self.first = None
        elif self.first is None or self.first[0] != waiting[0]:
            self.first = (waiting[0], time.monotonic())


def _holds(entry: os.DirEntry[str]) -> bool:
    """Whether there is anything in a segment that the writer may be about to remove."""
    try:
        return entry.stat().st_size > 0
    except FileNotFoundError:
        return False


def closed(folder: Path) -> Iterator[tuple[Path, list[Row]]]:
    """Every segment that nobody writes to any more, oldest first; it is removed when the caller comes back for the next."""
    for path in sorted(folder.glob("*.jsonl")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if not path.exists():
                continue
            yield path, read(file.read())
            path.unlink()


def read(data: bytes) -> list[Row]:
    """The whole lines of a segment; one that a crash cut is left out."""
    rows: list[Row] = []
    for line in data.splitlines():
        if not line.strip():  # a probe that a crash left
            continue
        try:
            table, values = jsons.loads(line)
        except ValueError:
            log.warning("A line of the journal that a crash cut is left out.")
            continue
        rows.append((table, values))
    return rows
