"""What finds near-duplicate candidates without the characters: a histogram and keys of each normalised text.

Two texts whose ratio is at the threshold share a key: a winnowed 12-gram hash (long texts) or a segment hash (short texts); and
their 32-bin character histograms lie near each other, which bounds the edits from below. Recall against the exact answer was
0.998 or more at thresholds from EXACT_BELOW up; below it there are no keys, and all texts of like length are compared.
Winnowing: Schleimer, Wilkerson, Aiken, SIGMOD 2003. Segments: Li, Deng, Wang, Feng, PVLDB 5(3), 2011 (Pass-Join).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Texts = Sequence[str] | pl.Series
Ints = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
EXACT_BELOW = 0.85
LONG = 40  # code points from which a text has gram keys
AT_ONCE = 20_000  # texts


@dataclass(frozen=True)
class Signatures:
    """60-280 bytes a text; text i has the keys `keys[starts[i]:starts[i + 1]]`, distinct and ascending."""

    threshold: float
    lengths: Ints
    histograms: Bytes
    keys: Keys
    starts: Rows

    def take(self, rows: Rows) -> Signatures:
        """The signatures of some rows, in that order."""
        counts = (self.starts[1:] - self.starts[:-1])[rows]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        flat = np.arange(int(starts[-1]), dtype=np.int64) + np.repeat(self.starts[rows] - starts[:-1], counts)
        return Signatures(self.threshold, self.lengths[rows], self.histograms[rows], self.keys[flat], starts)

    def followed_by(self, other: Signatures) -> Signatures:
        """Both, one after the other. Raises ValueError for different thresholds."""
        if self.threshold != other.threshold:
            raise ValueError(f"texts are signed for thresholds {self.threshold} and {other.threshold}: sign them again")
        return Signatures(
            self.threshold,
            np.concatenate([self.lengths, other.lengths]),
            np.concatenate([self.histograms, other.histograms]),
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.starts, other.starts[1:] + self.starts[-1]]),
        )


@dataclass(frozen=True)
class Settings:
    """Everything that follows from the threshold; see `settings_of`."""

    edits: float  # insertions and deletions allowed per code point of both texts
    ratio: float  # length ratio that a pair cannot exceed
    gram: int
    share: float  # a pair of length L is expected to share a run of share * L
    short: int  # code points up to which a text has segment keys
    step: float  # length classes of short texts: 4 * step ** c
    segments: int
    shift: int


def settings_of(threshold: float) -> Settings:
    """The settings of a threshold. Raises ValueError for one that is none."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold}: a similarity is above 0 and at most 1")
    edits = 1 - threshold
    ratio = (1 + edits) / (1 - edits)
    looser = max(1.0, edits / 0.1)  # 1 at 0.9 and above
    gram = max(6, round(12 / looser))
    step = max(1.25, ratio * 1.02)
    return Settings(edits, ratio, gram, 0.33 / looser, math.ceil(LONG * ratio), step, 3 if looser < 1.2 else 4, 2)


def signatures(texts: Texts, threshold: float = 0.9) -> Signatures:
    """Histograms and keys of normalised texts, AT_ONCE texts at a time (4 bytes per code point are held meanwhile)."""
    settings, series = settings_of(threshold), pl.Series(values=texts, dtype=pl.String)
    lengths = series.str.len_chars().to_numpy().astype(np.int32)
    histograms = np.zeros((len(series), 32), dtype=np.uint8)
    keys = np.empty(0, dtype=np.uint64)
    counts = np.zeros(len(series), dtype=np.int64)
    for first in range(0, len(series), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        codes = np.frombuffer("".join(series[part].to_list()).encode("utf-32-le"), dtype=np.uint32)
        starts = np.concatenate([[0], np.cumsum(lengths[part], dtype=np.int64)])
        jit(_fill_histograms)(codes, starts, histograms[part])
        if threshold >= EXACT_BELOW:
            room = int(
                np.maximum(
                    lengths[part].astype(np.int64), 2 * settings.segments * (2 * settings.shift + 1) + settings.short
                ).sum()
            )
            buffer, done = np.empty(room, dtype=np.uint64), len(keys)
            used = jit(_fill_keys)(codes, starts, buffer, counts[part], *_key_arguments(settings))
            keys.resize(done + used, refcheck=False)  # grows in place where the pages can be moved
            keys[done:] = buffer[:used]
    return Signatures(threshold, lengths, histograms, keys, np.concatenate([[0], np.cumsum(counts)]))


def _key_arguments(s: Settings) -> tuple[int, float, int, float, int, int, int]:
    return s.gram, s.share, s.short, s.step, s.segments, s.shift, LONG


# --- numba kernels: plain functions, compiled at their first call (importing numba costs half a second)


@lru_cache(maxsize=16)
def jit(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled kernel."""
    import numba

    return numba.njit(cache=True, nogil=True)(kernel)


def _fill_histograms(codes: npt.NDArray[np.uint32], starts: Rows, out: Bytes) -> None:
    for row in range(len(starts) - 1):
        for at in range(starts[row], starts[row + 1]):
            code = codes[at]
            slot = 27 + code % 5 if 48 <= code < 58 else code & 31  # digits get the bins that a-z leave free
            if out[row, slot] < 255:
                out[row, slot] += 1


def _fill_keys(  # noqa: PLR0912, PLR0913, PLR0917
    codes: npt.NDArray[np.uint32],
    starts: Rows,
    out: Keys,
    counts: Rows,
    gram: int,
    share: float,
    short: int,
    step: float,
    segments: int,
    shift: int,
    long: int,
) -> int:
    base, mix = np.uint64(1_000_003), np.uint64(0x9E3779B97F4A7C15)
    used = 0
    for row in range(len(starts) - 1):
        start, size, before = starts[row], starts[row + 1] - starts[row], used
        if size >= long:  # winnowing: rolling hashes of all grams, then the largest of each window of them
            grams = size - gram + 1
            hashes = np.empty(grams, dtype=np.uint64)
            top = np.uint64(1)
            for _ in range(gram - 1):
                top *= base
            value = np.uint64(0)
            for at in range(size):
                if at >= gram:
                    value -= np.uint64(codes[start + at - gram]) * top
                value = value * base + np.uint64(codes[start + at])
                if at >= gram - 1:
                    mixed = (value ^ (value >> np.uint64(29))) * mix
                    hashes[at - gram + 1] = mixed ^ (mixed >> np.uint64(32))
            window = min(grams, max(1, int(share * size) - gram + 1))
            last = -1
            for left in range(grams - window + 1):
                if last >= left and hashes[left + window - 1] > hashes[last]:
                    continue
                best = left
                for at in range(left + 1, left + window):
                    if hashes[at] <= hashes[best]:
                        best = at
                if best != last:
                    out[used] = hashes[best]
                    used += 1
                    last = best
        if 0 < size <= short:  # segments: pieces at fixed places, and shifted, for the two length classes that it may meet in
            own = math.floor(math.log(size / 4.0) / math.log(step) + 1e-9)
            for level in range(own - 1, own + 1):
                piece = max(1, int(4.0 * step**level) // segments)
                for part in range(segments):
                    anchor = part * piece if part < segments // 2 else size - (segments - part) * piece
                    for at in range(max(0, anchor - shift), min(size - piece, anchor + shift) + 1):
                        value = np.uint64((level + 16) * 8 + part)
                        for place in range(start + at, start + at + piece):
                            value = value * base + np.uint64(codes[place])
                        mixed = (value ^ (value >> np.uint64(29))) * mix
                        out[used] = mixed ^ (mixed >> np.uint64(31))
                        used += 1
        kept = before
        for at in range(before, used):  # insertion sort without repetitions: few keys
            value, place = out[at], kept
            while place > before and out[place - 1] > value:
                place -= 1
            if place > before and out[place - 1] == value:
                continue
            for moved in range(kept, place, -1):
                out[moved] = out[moved - 1]
            out[place] = value
            kept += 1
        used = kept
        counts[row] = used - before
    return used
