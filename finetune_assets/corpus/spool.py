"""Holds the typed rows of a source's parts while they are needed: in memory up to a limit, the rest in one temporary file.

The file is outside the home, and has no name from the moment it is made: whatever ends the process, the raw texts in it are gone.
"""

from __future__ import annotations

import io
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

Rows = npt.NDArray[np.int64]
CHUNK_ROWS = 1 << 12  # of the file: few rows of a part cost the reading of few chunks
CHUNKS = 16  # read at once
_COMPACT = pl.CompatLevel.oldest()  # Arrow's own strings, whose texts lie side by side


def compact(frame: pl.DataFrame) -> pl.DataFrame:
    """The same rows with texts of their own: those that Polars picks keep all texts of the frame that they are from in memory."""
    return pl.DataFrame(frame.to_arrow(compat_level=_COMPACT))


def size_of(frame: pl.DataFrame) -> int:
    """Bytes, with the 16 that Polars keeps for each text beside its letters."""
    return int(frame.estimated_size()) + 16 * frame.height * frame.dtypes.count(pl.String())


@dataclass(frozen=True)
class _Chunk:
    """Some rows of a part, in memory or at a place of the file."""

    rows: int
    frame: pl.DataFrame | None
    offset: int = 0
    length: int = 0


class Spool:
    """Parts by key, each a list of chunks; `limit` in bytes of memory."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._parts: dict[str, list[_Chunk]] = {}
        self._file: io.FileIO | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._parts

    def start(self, key: str) -> None:
        """Begins a part anew."""
        for chunk in self._parts.get(key, []):
            self._held -= size_of(chunk.frame) if chunk.frame is not None else 0
        self._parts[key] = []

    def add(self, key: str, frame: pl.DataFrame) -> None:
        """Appends rows to a part."""
        size = size_of(frame)
        if self._held + size <= self._limit:
            self._held += size
            self._parts[key].append(_Chunk(frame.height, frame))
            return
        file = self._opened()
        for some in frame.iter_slices(CHUNK_ROWS):
            start = file.tell()
            some.write_ipc_stream(file, compression="uncompressed", compat_level=_COMPACT)  # lz4: half the size, twice the time
            self._parts[key].append(_Chunk(some.height, None, start, file.tell() - start))

    def drop(self, key: str) -> None:
        """Forgets a part that was not read to its end."""
        self.start(key)
        del self._parts[key]

    def frames(self, key: str) -> list[pl.DataFrame]:
        """All of a part."""
        return [self._frame(chunk) for chunk in self._parts[key]]

    def take(self, key: str, rows: Rows) -> list[pl.DataFrame]:
        """The rows of these numbers (sorted) of a part, in frames."""
        chunks = self._parts[key]
        firsts = np.cumsum([0, *(chunk.rows for chunk in chunks)])
        places = np.searchsorted(rows, firsts)
        wanted = np.flatnonzero(np.diff(places)).tolist()
        found: list[pl.DataFrame] = []
        for start in range(0, len(wanted), CHUNKS):
            some = wanted[start : start + CHUNKS]
            frame = pl.concat([self._frame(chunks[at]) for at in some])
            own = [np.isin(np.arange(firsts[at], firsts[at + 1]), rows[places[at] : places[at + 1]]) for at in some]
            chosen = frame.filter(np.concatenate(own))
            read = sum(chunks[at].rows for at in some if chunks[at].frame is None)  # the others' texts are in memory anyway
            found.append(chosen if 2 * len(chosen) > read else compact(chosen))
        return found

    def _frame(self, chunk: _Chunk) -> pl.DataFrame:
        if chunk.frame is not None:
            return chunk.frame
        content = b""
        while len(content) < chunk.length:  # one call reads 2 GiB at most
            content += os.pread(self._opened().fileno(), chunk.length - len(content), chunk.offset + len(content))
        return pl.read_ipc_stream(content)

    def _opened(self) -> io.FileIO:
        if self._file is None:
            descriptor, name = tempfile.mkstemp(prefix="finetune-")
            Path(name).unlink()
            self._file = io.FileIO(descriptor, "r+")
            weakref.finalize(self, self._file.close)
        return self._file
