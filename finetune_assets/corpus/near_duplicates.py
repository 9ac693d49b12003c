"""Near-duplicates: `rapidfuzz.fuzz.ratio` / 100 of normalised texts at or above a threshold.

`drop_near_duplicates(normalise(series).to_list(), rank)` names for each text the kept one it is a copy of. Candidates share
a key: winnowed 12-gram hashes (long texts), segment hashes (short texts). A 32-bin character histogram bounds the edits from
below. Every pair is then verified, so precision is 1; recall against the exact answer was 0.998 or more at thresholds from
EXACT_BELOW up. Below it all texts of like length are compared, which is exact and quadratic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from rapidfuzz import fuzz, process

Ints = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint64]
EXACT_BELOW = 0.85
LONG = 40  # code points from which a text has gram keys
FIRST_BLOCK = 4_000  # texts of the first block of `drop_near_duplicates`; each next block is as large as all before it
VERIFY_AT_ONCE = 1_000_000  # candidate pairs per call of rapidfuzz: bounds its lists to about 20 MB


@dataclass(frozen=True)
class Pairs:
    """Verified pairs, left < right, sorted by both; score = ratio / 100."""

    left: Ints
    right: Ints
    score: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.left)


@dataclass(frozen=True)
class Signatures:
    """What finds candidates without the characters, 60-280 bytes a text; text i has `keys[starts[i]:starts[i + 1]]`."""

    threshold: float
    lengths: Ints
    histograms: npt.NDArray[np.uint8]
    keys: Keys
    starts: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.int64]) -> Signatures:
        """The signatures of some rows, in that order."""
        counts = (self.starts[1:] - self.starts[:-1])[rows]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        flat = np.arange(int(starts[-1]), dtype=np.int64) + np.repeat(self.starts[rows] - starts[:-1], counts)
        return Signatures(self.threshold, self.lengths[rows], self.histograms[rows], self.keys[flat], starts)


@dataclass(frozen=True)
class _Settings:
    """Everything that follows from the threshold."""

    edits: float  # insertions and deletions allowed per code point of both texts
    ratio: float  # length ratio that a pair cannot exceed
    gram: int
    share: float  # a pair of length L is expected to share a run of share * L
    short: int  # code points up to which a text has segment keys
    step: float  # length classes of short texts: 4 * step ** c
    segments: int
    shift: int


def _settings(threshold: float) -> _Settings:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold}: a similarity is above 0 and at most 1")
    edits = 1 - threshold
    ratio = (1 + edits) / (1 - edits)
    looser = max(1.0, edits / 0.1)  # 1 at 0.9 and above
    gram = max(6, round(12 / looser))
    step = max(1.25, ratio * 1.02)
    return _Settings(edits, ratio, gram, 0.33 / looser, math.ceil(LONG * ratio), step, 3 if looser < 1.2 else 4, 2)


# --- texts


def normalise(series: pl.Series) -> pl.Series:
    """NFKC, casefold, no punctuation or emoji, single spaces (lower case plus ß and ς, where Unicode's casefold differs most)."""
    text = series.str.normalize("NFKC").str.to_lowercase().str.replace_all("ß", "ss").str.replace_all("ς", "σ")
    text = text.str.replace_all(r"[\x{FE00}-\x{FE0F}\x{20E3}]|[^\p{L}\p{M}\p{N}\s]", "")
    return text.str.replace_all(r"\s+", " ").str.strip_chars()


def exact_keys(texts: Sequence[str]) -> Keys:
    """A 64-bit BLAKE2b hash per text: the same in every process, platform and library version."""
    joined = b"".join(hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=8).digest() for t in texts)
    return np.frombuffer(joined, dtype="<u8").astype(np.uint64)


def signatures(texts: Sequence[str], threshold: float = 0.9) -> Signatures:
    """Histograms and keys of normalised texts, 50,000 texts at a time (4 bytes per code point are held meanwhile)."""
    settings = _settings(threshold)
    lengths = np.fromiter(map(len, texts), dtype=np.int32, count=len(texts))
    histograms = np.zeros((len(texts), 32), dtype=np.uint8)
    keys: list[Keys] = [np.empty(0, dtype=np.uint64)]
    counts = np.zeros(len(texts), dtype=np.int64)
    for first in range(0, len(texts), 50_000):
        part = slice(first, first + 50_000)
        codes = np.frombuffer("".join(texts[part]).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        starts = np.concatenate([[0], np.cumsum(lengths[part], dtype=np.int64)])
        _jit(_fill_histograms)(codes, starts, histograms[part])
        if threshold >= EXACT_BELOW:
            room = int(
                np.maximum(
                    lengths[part].astype(np.int64), 2 * settings.segments * (2 * settings.shift + 1) + settings.short
                ).sum()
            )
            buffer = np.empty(room, dtype=np.uint64)
            used = _jit(_fill_keys)(codes, starts, buffer, counts[part], *_key_arguments(settings))
            keys.append(buffer[:used].copy())
    return Signatures(threshold, lengths, histograms, np.concatenate(keys), np.concatenate([[0], np.cumsum(counts)]))


def _key_arguments(s: _Settings) -> tuple[int, float, int, float, int, int, int]:
    return s.gram, s.share, s.short, s.step, s.segments, s.shift, LONG


# --- numba kernels: plain functions, compiled at their first call (importing numba costs half a second)


@lru_cache(maxsize=16)
def _jit(kernel: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    return numba.njit(cache=True, nogil=True)(kernel)


def _fill_histograms(codes: npt.NDArray[np.uint32], starts: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
    for row in range(len(starts) - 1):
        for at in range(starts[row], starts[row + 1]):
            code = codes[at]
            slot = 27 + code % 5 if 48 <= code < 58 else code & 31  # digits get the bins that a-z leave free
            if out[row, slot] < 255:
                out[row, slot] += 1


def _fill_keys(  # noqa: PLR0912, PLR0913, PLR0917
    codes: npt.NDArray[np.uint32],
    starts: npt.NDArray[np.int64],
    out: Keys,
    counts: npt.NDArray[np.int64],
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
        if size >= long:
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
        if 0 < size <= short:
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
        counts[row] = used - before
    return used


def _join(  # noqa: PLR0913, PLR0917
    lengths: Ints,
    histograms: npt.NDArray[np.uint8],
    side: npt.NDArray[np.uint8],
    starts: npt.NDArray[np.int64],
    place: npt.NDArray[np.int64],
    rows: Ints,
    ends: npt.NDArray[np.int64],
    edits: float,
    every: bool,
) -> tuple[Ints, Ints]:
    """Rows come sorted by length; postings of one key stand together in row order. `every`: all rows of like length."""
    count = len(lengths)
    stamp = np.full(count, -1, dtype=np.int32)
    left, right = np.empty(1024, dtype=np.int32), np.empty(1024, dtype=np.int32)
    used = 0
    for i in range(count):
        limit = lengths[i] * (1 + edits) / (1 - edits) + 1e-9
        looks = 1 if every else starts[i + 1] - starts[i]
        for look in range(looks):
            first = i + 1 if every else place[starts[i] + look] + 1
            stop = count if every else ends[first - 1]
            for at in range(first, stop):
                j = at if every else rows[at]
                if lengths[j] > limit:
                    break
                if j == i or stamp[j] == i or (side[i] == side[j] and side[i] != 2):
                    continue
                stamp[j] = i
                room = int(edits * (lengths[i] + lengths[j]) + 1e-9)
                apart = 0
                for slot in range(32):
                    apart += abs(np.int32(histograms[i, slot]) - np.int32(histograms[j, slot]))
                    if apart > room:
                        break
                if apart <= room:
                    if used == len(left):
                        left = np.concatenate((left, np.empty(used, dtype=np.int32)))
                        right = np.concatenate((right, np.empty(used, dtype=np.int32)))
                    left[used], right[used] = i, j
                    used += 1
    return left[:used], right[:used]


def _walk(
    order: npt.NDArray[np.int64], place: Ints, starts: npt.NDArray[np.int64], others: Ints, kept_by: npt.NDArray[np.int64]
) -> None:
    for row in order:
        best = -1
        for at in range(starts[row], starts[row + 1]):
            other = others[at]
            if place[other] < place[row] and kept_by[other] == -1 and (best == -1 or place[other] < place[best]):
                best = other
        kept_by[row] = best


# --- pairs


def _candidates(signed: Signatures, side: npt.NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Rows that share a key and may be near enough; side 2 pairs with all, 0 only with 1."""
    by_length = np.argsort(signed.lengths, kind="stable")
    s = signed.take(by_length)
    order = np.argsort(s.keys, kind="stable")  # stable: within one key the rows stay sorted by length
    ranked = s.keys[order]
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    rows = np.repeat(np.arange(len(s.lengths), dtype=np.int32), np.diff(s.starts))[order]
    bounds = (
        np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))
        if len(ranked)
        else np.zeros(1, dtype=np.int64)
    )
    ends = np.repeat(bounds[1:], np.diff(bounds)).astype(np.int64)
    every = s.threshold < EXACT_BELOW
    left, right = _jit(_join)(s.lengths, s.histograms, side[by_length], s.starts, place, rows, ends, 1 - s.threshold, every)
    return by_length[left].astype(np.int32), by_length[right].astype(np.int32)


def _verified(left_texts: Sequence[str], right_texts: Sequence[str], left: Ints, right: Ints, threshold: float) -> Pairs:
    scores: list[npt.NDArray[np.float32]] = [np.empty(0, dtype=np.float32)]
    for first in range(0, len(left), VERIFY_AT_ONCE):
        part = slice(first, first + VERIFY_AT_ONCE)
        queries, choices = [left_texts[i] for i in left[part]], [right_texts[j] for j in right[part]]
        scores.append(process.cpdist(queries, choices, scorer=fuzz.ratio, score_cutoff=100 * threshold, dtype=np.float32))
    score = np.concatenate(scores)
    good = np.flatnonzero(score > 0)
    good = good[np.lexsort((right[good], left[good]))]
    return Pairs(left[good], right[good], score[good] / np.float32(100))


def pairs_between(old: Signatures, old_texts: Sequence[str], new: Signatures, new_texts: Sequence[str]) -> Pairs:
    """Pairs of an old text (left) and a new one (right), which may be equal; both signed with the same threshold."""
    if old.threshold != new.threshold:
        raise ValueError(f"old texts are signed for threshold {old.threshold}, new ones for {new.threshold}: sign them again")
    n = len(old.lengths)
    starts = np.concatenate([old.starts, new.starts[1:] + old.starts[-1]])
    keys, histograms = np.concatenate([old.keys, new.keys]), np.concatenate([old.histograms, new.histograms])
    both = Signatures(old.threshold, np.concatenate([old.lengths, new.lengths]), histograms, keys, starts)
    left, right = _candidates(both, (np.arange(len(both.lengths)) >= n).astype(np.uint8))
    return _verified(old_texts, new_texts, np.minimum(left, right), np.maximum(left, right) - np.int32(n), old.threshold)


def find_pairs(texts: Sequence[str], threshold: float = 0.9) -> Pairs:
    """All pairs of distinct normalised texts; equal texts are refused, since k of them make k² / 2 pairs (see `exact_keys`)."""
    if len(set(texts)) < len(texts):
        raise ValueError(f"{len(texts) - len(set(texts))} of {len(texts)} texts repeat another one: collapse equal texts first")
    return _pairs_within(signatures(texts, threshold), texts)


def _pairs_within(signed: Signatures, texts: Sequence[str]) -> Pairs:
    left, right = _candidates(signed, np.full(len(texts), 2, dtype=np.uint8))
    return _verified(texts, texts, np.minimum(left, right), np.maximum(left, right), signed.threshold)


# --- which texts stay


def keep_best(n: int, pairs: Pairs, rank: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Walk from the best rank on (the lowest; no ties), drop a text only if a partner is kept: -1 for kept, else that partner."""
    order = np.argsort(rank, kind="stable").astype(np.int64)
    place = np.empty(n, dtype=np.int32)
    place[order] = np.arange(n, dtype=np.int32)
    rows, others = np.concatenate([pairs.left, pairs.right]), np.concatenate([pairs.right, pairs.left])
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))]).astype(np.int64)
    kept_by = np.full(n, -1, dtype=np.int64)
    _jit(_walk)(order, place, starts, others[np.argsort(rows, kind="stable")], kept_by)
    return kept_by


def drop_near_duplicates(texts: Sequence[str], rank: npt.NDArray[np.int64], threshold: float = 0.9) -> npt.NDArray[np.int64]:
    """What `keep_best` says about all pairs, equal texts included, without holding them: -1 for kept, else the kept text.

    100,000 texts out of 50 templates have 100 million pairs. So texts are taken in rank order, in blocks that double: a block
    is first compared with the texts kept so far, and only what is left within itself. The answer is that of all pairs. It
    costs up to twice the joins of `find_pairs`; at worst it holds the first block's pairs (8 million for one template).
    """
    order = np.argsort(rank, kind="stable").astype(np.int64)
    kept_by = np.full(len(texts), -1, dtype=np.int64)
    first_of: dict[str, int] = {}
    for row in map(int, order):
        kept_by[row] = first_of.setdefault(texts[row], row)
    distinct = order[kept_by[order] == order]
    signed = signatures(_texts(texts, distinct), threshold)
    kept, done = np.empty(0, dtype=np.int64), 0  # positions in `distinct`
    answer = np.full(len(distinct), -1, dtype=np.int64)
    while done < len(distinct):
        block = np.arange(done, min(len(distinct), max(FIRST_BLOCK, 2 * done)))
        done = int(block[-1]) + 1
        if len(kept):
            pairs = pairs_between(
                signed.take(kept), _texts(texts, distinct[kept]), signed.take(block), _texts(texts, distinct[block])
            )
            rows, firsts = np.unique(pairs.right[np.argsort(pairs.left, kind="stable")], return_index=True)
            answer[block[rows]] = kept[np.sort(pairs.left)[firsts]]
            block = block[answer[block] == -1]
        within = _pairs_within(signed.take(block), _texts(texts, distinct[block]))
        inner = keep_best(len(block), within, np.arange(len(block)))
        answer[block[inner >= 0]] = block[inner[inner >= 0]]
        kept = np.concatenate([kept, block[inner < 0]])
    by_row = np.full(len(texts), -1, dtype=np.int64)  # for the first of equal texts: the kept text it is near, or -1
    by_row[distinct[answer >= 0]] = distinct[answer[answer >= 0]]
    first_is_kept = by_row[kept_by] == -1
    return np.where(first_is_kept, np.where(kept_by == np.arange(len(texts)), -1, kept_by), by_row[kept_by])


def _texts(texts: Sequence[str], rows: npt.NDArray[np.int64]) -> list[str]:
    return [texts[int(i)] for i in rows]
