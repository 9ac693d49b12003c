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


def compact(frame: pl.DataFrame) -> pl.DataFrame:
    """The same rows with texts of their own: those that Polars picks keep all texts of the frame that they are from in memory."""
    return pl.DataFrame(frame.to_arrow(compat_level=pl.CompatLevel.oldest()))  # whose texts lie side by side


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
        self._limit, self._held, self._end = limit, 0, 0
        self._parts: dict[str, list[_Chunk]] = {}
        self._file: int | None = None

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
        for some in frame.iter_slices(CHUNK_ROWS):
            buffer = io.BytesIO()
            some.write_ipc_stream(buffer, compression="lz4")
            content = buffer.getvalue()
            written = 0
            while written < len(content):
                written += os.pwrite(self._opened(), content[written:], self._end + written)
            self._parts[key].append(_Chunk(some.height, None, self._end, len(content)))
            self._end += len(content)

    def drop(self, key: str) -> None:
        """Forgets a part that was not read to its end."""
        self.start(key)
        del self._parts[key]

    def frames(self, key: str) -> list[pl.DataFrame]:
        """All of a part."""
        return [self._frame(chunk) for chunk in self._parts[key]]

    def take(self, key: str, rows: Rows) -> list[pl.DataFrame]:
        """The rows of these numbers (sorted) of a part, in frames."""
        found: list[pl.DataFrame] = []
        first = 0
        for chunk in self._parts[key]:
            low, high = np.searchsorted(rows, [first, first + chunk.rows])
            if high > low:
                frame = self._frame(chunk)
                own = frame if high - low == chunk.rows else frame[rows[low:high] - first]
                held = chunk.frame is not None or 2 * len(own) > chunk.rows  # its texts are in memory anyway, or mostly wanted
                found.append(own if held else compact(own))
            first += chunk.rows
        return found

    def _frame(self, chunk: _Chunk) -> pl.DataFrame:
        if chunk.frame is not None:
            return chunk.frame
        content, at = bytearray(chunk.length), 0
        while at < chunk.length:  # one call reads 2 GiB at most
            at += os.preadv(self._opened(), [memoryview(content)[at:]], chunk.offset + at)
        return pl.read_ipc_stream(io.BytesIO(content))

    def _opened(self) -> int:
        if self._file is None:
            self._file, name = tempfile.mkstemp(prefix="finetune-")
            Path(name).unlink()
            weakref.finalize(self, os.close, self._file)
        return self._file
