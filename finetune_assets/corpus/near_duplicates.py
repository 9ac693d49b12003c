"""Near-duplicates: `rapidfuzz.fuzz.ratio` / 100 of normalised texts at or above a threshold.

`drop_near_duplicates(normalise(series).to_list(), rank)` names for each text the kept one it is a copy of. Candidates share a
key (`signatures`) and have histograms that lie near enough; every pair is then verified, so precision is 1.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt
import polars as pl
from rapidfuzz import fuzz, process

from finetune_assets.corpus.signatures import EXACT_BELOW, Bytes, Ints, Keys, Rows, Signatures, Texts, jit, signatures

__all__ = [
    "EXACT_BELOW",
    "Pairs",
    "Signatures",
    "drop_near_duplicates",
    "exact_keys",
    "find_pairs",
    "keep_best",
    "normalise",
    "pairs_between",
    "signatures",
]

ENOUGH = 10  # candidate pairs a text from which `drop_near_duplicates` goes on in blocks
FIRST_BLOCK = 500  # texts of the first block; each next block is as large as all before it
VERIFY_AT_ONCE = 2**17  # candidate pairs per call of rapidfuzz: bounds its texts to about 30 MB
POSTINGS_AT_ONCE = 2**24  # keys of 8 bytes that are sorted and joined at a time


@dataclass(frozen=True)
class Pairs:
    """Verified pairs, left < right, sorted by both; score = ratio / 100."""

    left: Ints
    right: Ints
    score: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.left)


# --- texts


_LETTERS = "áéíóúüñçãõâêôà"
_MAY_CHANGE = rf"[^\x00-\x7F\x{{BF}}\x{{A1}}{_LETTERS.upper()}{_LETTERS}]"  # NFKC leaves all others as they are, side by side
FEW = 2_000  # texts for which numba is not imported


def normalise(series: pl.Series) -> pl.Series:
    """NFKC, casefold, no punctuation or emoji, single spaces (lower case plus ß and ς, where Unicode's casefold differs most).

    Texts of ASCII and the letters of Spanish and Portuguese go through a kernel, five times as fast.
    """
    if len(series) < FEW or series.null_count():
        return _normalised(series)
    import pyarrow as pa  # noqa: PLC0415

    texts = series.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    _, offsets, content = texts.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    codes = np.frombuffer(content, dtype=np.uint8) if content is not None else np.empty(0, dtype=np.uint8)
    out, ends = np.empty(int(starts[-1] - starts[0]), dtype=np.uint8), np.zeros(len(texts) + 1, dtype=np.int64)
    odd = np.empty(len(texts), dtype=np.int64)
    odd = odd[: jit(_plain)(codes, starts, _classes(), out, ends, odd)]
    made = pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(out))
    plain = cast("pl.Series", pl.from_arrow(made)).alias(series.name)
    return plain.scatter(odd, _normalised(series.gather(odd))) if len(odd) else plain


@lru_cache(maxsize=1)
def _classes() -> Bytes:
    """What becomes of a byte, of the byte after 0xC2, and of that after 0xC3: itself in lower case, 32 (white space), 1
    (nothing), 2 or 3 (the first of two bytes), 0 (only Unicode's tables know)."""
    table = np.zeros(3 * 256, dtype=np.uint8)
    table[:128] = 1
    for code in filter(lambda code: chr(code).isalnum(), range(128)):
        table[code] = ord(chr(code).lower())
    table[[9, 10, 11, 12, 13, 32]] = 32
    table[[0xC2, 0xC3]] = 2, 3
    table[[256 + 0xA1, 256 + 0xBF]] = 1  # ¡ and ¿
    for letter in _LETTERS:
        table[[512 + letter.encode()[1], 512 + letter.upper().encode()[1]]] = letter.encode()[1]
    return table


def _plain(codes: Bytes, starts: Rows, table: Bytes, out: Bytes, ends: Rows, odd: Rows) -> int:
    """Writes the normalised texts one after the other, and the rows that it does not know into `odd`; gives how many."""
    used, unknown = 0, 0
    for row in range(len(starts) - 1):
        begin, lead, blank = used, 0, True
        for at in range(starts[row], starts[row + 1]):
            become = table[lead * 256 + codes[at]]
            if become < 4:
                if become == 0:
                    odd[unknown] = row
                    unknown, used, blank = unknown + 1, begin, True
                    break
                lead = 0 if become == 1 else become - 1
                continue
            if lead == 2:
                out[used] = 0xC3
                used += 1
            lead = 0
            if become == 32:
                if blank:
                    continue
                blank = True
            else:
                blank = False
            out[used] = become
            used += 1
        if used > begin and out[used - 1] == 32:
            used -= 1
        ends[row + 1] = used
    return unknown


def _normalised(series: pl.Series) -> pl.Series:
    text = _nfkc(series).str.to_lowercase().str.replace_many(["ß", "ς"], ["ss", "σ"])
    text = text.str.replace_all(r"[\x{FE00}-\x{FE0F}\x{20E3}]|[^\p{L}\p{M}\p{N}\s]", "")
    return text.str.replace_all(r"\s\s+|[^\S ]", " ").str.strip_chars()


def _nfkc(series: pl.Series) -> pl.Series:
    """NFKC, which is slow, of the texts in which it may change something; null stays null."""
    odd = series.str.contains(_MAY_CHANGE)
    changed = series.filter(odd).str.normalize("NFKC")
    return series.clone().scatter(odd.arg_true(), changed) if len(changed) else series


def exact_keys(texts: Texts) -> Keys:
    """A 64-bit BLAKE2b hash per text: the same in every process, platform and library version."""
    empty, digests = hashlib.blake2b(digest_size=8), list[bytes]()
    for text in _series(texts).cast(pl.Binary).to_list():
        state = empty.copy()  # half the time of a new one
        state.update(text)
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


# --- kernels: plain functions, compiled by numba at their first call


def _join(  # noqa: PLR0912, PLR0913, PLR0917
    postings: Keys,
    bits: int,
    ends: Ints,
    side: Bytes,
    lengths: Ints,
    histograms: Bytes,
    keys: Keys,
    starts: Rows,
    edits: float,
    most: int,
) -> Keys:
    """Candidate pairs as left * 2**32 + right; more than `most` of them: cut off there.

    Rows stand in order of length; row i may pair with the rows before `ends[i]`. A posting is the upper bits of a key, then its
    row; they come sorted, so the rows of one key stand together, in order of length. A pair that shares several keys is
    taken at the first of them.
    """
    low = np.uint64(bits)
    mask = (np.uint64(1) << low) - np.uint64(1)
    count = len(postings)
    out = np.empty(1024, dtype=np.uint64)
    rows = np.empty(1024, dtype=np.int64)  # of one key, and their histograms, side by side
    near = np.empty((1024, 32), dtype=np.uint8)
    used, first = 0, 0
    while first < count and used <= most:
        key, stop = postings[first] >> low, first + 1
        while stop < count and postings[stop] >> low == key:
            stop += 1
        size = 0  # gather the key's rows, those of side 0 first
        if stop - first > len(rows):
            rows, near = np.empty(2 * (stop - first), dtype=np.int64), np.empty((2 * (stop - first), 32), dtype=np.uint8)
        old = 0  # rows of side 0, which stand first
        for new_side in range(2 if stop - first > 1 else 0):
            for at in range(first, stop):
                row = np.int64(postings[at] & mask)
                if (side[row] != 0) == (new_side == 1) and (size == 0 or rows[size - 1] != row):
                    rows[size], near[size] = row, histograms[row]
                    size += 1
            if new_side == 0:
                old = size
        first = stop
        low_row, high_row = 0, 0  # then pair each with those of like length and near histogram, at the first key they share
        for at in range(old, size):
            i = rows[at]
            last = size if side[i] == 2 else old
            while high_row < last and rows[high_row] < ends[i]:
                high_row += 1
            while low_row < last and ends[rows[low_row]] <= i:
                low_row += 1
            if used > most:
                break
            most_apart = edits * lengths[i] + 1e-9
            for other in range(at + 1 if side[i] == 2 else low_row, high_row):
                apart = np.int32(0)
                for slot in range(32):
                    apart += np.int32(max(near[at, slot], near[other, slot]) - min(near[at, slot], near[other, slot]))
                j = rows[other]
                if apart > most_apart + edits * lengths[j]:
                    continue
                a, b = starts[i], starts[j]
                while keys[a] >> low != keys[b] >> low:
                    if keys[a] < keys[b]:
                        a += 1
                    else:
                        b += 1
                if keys[a] >> low != key:
                    continue
                if used == len(out):
                    out = np.concatenate((out, np.empty(used, dtype=np.uint64)))
                out[used] = (np.uint64(min(i, j)) << np.uint64(32)) | np.uint64(max(i, j))
                used += 1
    return out[:used]


def _join_all(ends: Ints, side: Bytes, lengths: Ints, histograms: Bytes, edits: float, most: int) -> Keys:
    """The same without keys: all rows of like length."""
    out = np.empty(1024, dtype=np.uint64)
    used = 0
    for i in range(len(lengths)):
        for j in range(i + 1, ends[i]):
            if side[i] == side[j] and side[i] != 2:
                continue
            apart = np.int32(0)
            for slot in range(32):
                apart += np.int32(max(histograms[i, slot], histograms[j, slot]) - min(histograms[i, slot], histograms[j, slot]))
            if apart > int(edits * (lengths[i] + lengths[j]) + 1e-9):
                continue
            if used > most:
                return out[:used]
            if used == len(out):
                out = np.concatenate((out, np.empty(used, dtype=np.uint64)))
            out[used] = (np.uint64(i) << np.uint64(32)) | np.uint64(j)
            used += 1
    return out[:used]


def _postings(  # noqa: PLR0913, PLR0917
    keys: Keys, starts: Rows, place: Keys, shared: Bytes, bits: int, slices: int, number: int
) -> Keys:
    """One of so many slices (a power of 2) of the hashes: the upper bits of each key, then the place of its row. With `shared`
    only those that it knows."""
    low, size = np.uint64(bits), 0
    out = np.empty(0, dtype=np.uint64)
    for turn in range(2):  # counts, then writes
        used = 0
        for row in range(len(starts) - 1):
            for at in range(starts[row], starts[row + 1]):
                key = keys[at]
                if slices > 1 and (key >> np.uint64(32)) * np.uint64(slices) >> np.uint64(32) != np.uint64(number):
                    continue
                if len(shared) and not shared[key >> np.uint64(40)]:
                    continue
                if turn == 1:
                    out[used] = (key >> low << low) | np.uint64(place[row])
                used += 1
        if turn == 0:
            size = used
            out = np.empty(size, dtype=np.uint64)
    return out


def _by_row(pairs: Keys, rows: Keys) -> None:
    """Puts the rows in the place of their places; the smaller one is the left one."""
    for at in range(len(pairs)):
        one, other = np.uint64(rows[pairs[at] >> np.uint64(32)]), np.uint64(rows[pairs[at] & np.uint64(2**32 - 1)])
        pairs[at] = (min(one, other) << np.uint64(32)) | max(one, other)


def _walk(order: Rows, place: Ints, starts: Rows, others: Ints, kept_by: Rows) -> None:
    for row in order:
        best = -1
        for at in range(starts[row], starts[row + 1]):
            other = others[at]
            if place[other] < place[row] and kept_by[other] == -1 and (best == -1 or place[other] < place[best]):
                best = other
        kept_by[row] = best


# --- pairs


def _candidates(signed: Signatures, side: Bytes, most: int = 2**62) -> Keys:
    """Rows that share a key and may be near enough, as left * 2**32 + right, left < right; side 2 pairs with all, 0 only with 1.

    More than `most`: cut off there.
    """
    edits = 1 - signed.threshold
    by_length = np.argsort(signed.lengths, kind="stable").astype(np.uint32)
    lengths = signed.lengths[by_length]
    ends = np.searchsorted(lengths, lengths * (1 + edits) / (1 - edits) + 1e-9, side="right").astype(np.int32)
    sides, histograms = side[by_length], signed.histograms[by_length]
    if signed.threshold < EXACT_BELOW:
        found = [jit(_join_all)(ends, sides, lengths, histograms, edits, most)]
    else:
        starts, bits = signed.starts[by_length], max(1, int(len(lengths) - 1).bit_length())
        place = np.empty(len(lengths), dtype=np.uint32)
        place[by_length] = np.arange(len(lengths), dtype=np.uint32)
        shared, found = _shared(signed, side), list[Keys]()
        slices = 2 ** max(0, math.ceil(math.log2(max(len(signed.keys), 1) / POSTINGS_AT_ONCE)))
        for number in range(slices):  # of the hashes
            postings = jit(_postings)(signed.keys, signed.starts, place, shared, bits, slices, number)
            postings.sort()
            left = most - sum(map(len, found))
            found.append(jit(_join)(postings, bits, ends, sides, lengths, histograms, signed.keys, starts, edits, left))
            if len(found[-1]) > left:
                break
    for pairs in found:
        jit(_by_row)(pairs, by_length)
    return np.concatenate(found)


def _shared(signed: Signatures, side: Bytes) -> npt.NDArray[np.bool_]:
    """By their first 24 bits, the keys that stand on side 1; empty where there are no sides. Rows of side 0 come first."""
    if not len(side) or side[0] == 2:
        return np.empty(0, dtype=np.bool_)
    seen = np.zeros(2**24, dtype=np.bool_)
    seen[signed.keys[signed.starts[np.count_nonzero(side == 0)] :] >> np.uint64(40)] = True
    return seen


def _verified(left_texts: pl.Series, right_texts: pl.Series, candidates: Keys, threshold: float) -> Pairs:
    """`candidates`: rows of both as left * 2**32 + right."""
    good, scores = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.float32)]
    for first in range(0, len(candidates), VERIFY_AT_ONCE):
        part = candidates[first : first + VERIFY_AT_ONCE]
        queries, choices = _strings(left_texts, part >> np.uint64(32)), _strings(right_texts, part & np.uint64(2**32 - 1))
        score = process.cpdist(queries, choices, scorer=fuzz.ratio, score_cutoff=100 * threshold, dtype=np.float32)
        good.append(part[score > 0])
        scores.append(score[score > 0])
    pairs, score = np.concatenate(good), np.concatenate(scores)
    order = np.argsort(pairs)
    left, right = (pairs >> np.uint64(32)).astype(np.int32), (pairs & np.uint64(2**32 - 1)).astype(np.int32)
    return Pairs(left[order], right[order], score[order] / np.float32(100))


def _strings(texts: pl.Series, rows: Keys) -> list[str]:
    """The texts of some rows, each made once."""
    wanted = np.zeros(len(texts), dtype=np.bool_)
    wanted[rows] = True
    made = np.array(texts.filter(pl.Series(wanted)).to_list(), dtype=np.object_)
    return made[np.cumsum(wanted)[rows] - 1].tolist()


def pairs_between(old: Signatures, old_texts: Texts, new: Signatures, new_texts: Texts) -> Pairs:
    """Pairs of an old text (left) and a new one (right), which may be equal; both signed with the same threshold."""
    both = old.followed_by(new)
    n = len(old.lengths)
    found = _candidates(both, (np.arange(len(both.lengths)) >= n).astype(np.uint8)) - np.uint64(n)
    return _verified(_series(old_texts), _series(new_texts), found, old.threshold)


def find_pairs(texts: Texts, threshold: float = 0.9) -> Pairs:
    """All pairs of distinct normalised texts; equal texts are refused, since k of them make k² / 2 pairs (see `exact_keys`)."""
    series = _series(texts)
    if repeated := len(series) - series.n_unique():
        raise ValueError(f"{repeated} of {len(series)} texts repeat another one: collapse equal texts first")
    found = _candidates(signatures(series, threshold), np.full(len(series), 2, dtype=np.uint8))
    return _verified(series, series, found, threshold)


def _series(texts: Texts) -> pl.Series:
    return pl.Series(values=texts, dtype=pl.String)


# --- which texts stay


def keep_best(n: int, pairs: Pairs, rank: Rows) -> Rows:
    """Walk from the best rank on (the lowest; no ties), drop a text only if a partner is kept: -1 for kept, else that partner."""
    order = np.argsort(rank, kind="stable").astype(np.int64)
    place = np.empty(n, dtype=np.int32)
    place[order] = np.arange(n, dtype=np.int32)
    rows, others = np.concatenate([pairs.left, pairs.right]), np.concatenate([pairs.right, pairs.left])
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))]).astype(np.int64)
    kept_by = np.full(n, -1, dtype=np.int64)
    jit(_walk)(order, place, starts, others[np.argsort(rows, kind="stable")], kept_by)
    return kept_by


def drop_near_duplicates(texts: Texts, rank: Rows, threshold: float = 0.9) -> Rows:
    """What `keep_best` says about all pairs, equal texts included, without holding them: -1 for kept, else the kept text.

    100,000 texts out of 50 templates have 100 million pairs. Where there are more than ENOUGH a text, texts are taken in rank
    order, in blocks that double: a block is first compared with the texts kept so far, then what is left within itself, in the
    same way. The answer is that of all pairs.
    """
    order = np.argsort(rank, kind="stable").astype(np.int64)
    ranked = _series(texts).gather(order)
    first = ranked.to_frame("text").with_row_index().select(pl.col("index").first().over("text")).to_series().to_numpy()
    distinct = np.flatnonzero(first == np.arange(len(order)))
    chosen = ranked.gather(distinct)
    answer = _walked(signatures(chosen, threshold), chosen)
    near = np.full(len(order), -1, dtype=np.int64)  # for the first of equal texts: the kept text it is near, or -1
    near[distinct[answer >= 0]] = distinct[answer[answer >= 0]]
    near = np.where((near[first] == -1) & (first < np.arange(len(order))), first, near[first])
    kept_by = np.empty_like(near)
    kept_by[order] = np.where(near >= 0, order[near], -1)
    return kept_by


def _walked(signed: Signatures, texts: pl.Series) -> Rows:
    """What `keep_best` says about all pairs of distinct texts in order of rank."""
    most = ENOUGH * len(texts) if len(texts) > FIRST_BLOCK else 2**62
    found = _candidates(signed, np.full(len(texts), 2, dtype=np.uint8), most)
    if len(found) > most:
        return _walked_in_blocks(signed, texts)
    return keep_best(len(texts), _verified(texts, texts, found, signed.threshold), np.arange(len(texts)))


def _walked_in_blocks(signed: Signatures, texts: pl.Series) -> Rows:
    kept, done = np.empty(0, dtype=np.int64), 0  # positions in `distinct`
    answer = np.full(len(texts), -1, dtype=np.int64)
    while done < len(texts):
        block = np.arange(done, min(len(texts), max(FIRST_BLOCK, 2 * done)))
        done = int(block[-1]) + 1
        if len(kept):
            pairs = pairs_between(signed.take(kept), texts.gather(kept), signed.take(block), texts.gather(block))
            rows, firsts = np.unique(pairs.right[np.argsort(pairs.left, kind="stable")], return_index=True)
            answer[block[rows]] = kept[np.sort(pairs.left)[firsts]]
            block = block[answer[block] == -1]
        inner = _walked(signed.take(block), texts.gather(block))
        answer[block[inner >= 0]] = block[inner[inner >= 0]]
        kept = np.concatenate([kept, block[inner < 0]])
    return answer
