"""All pairs with ratio ≥ 0.9 among distinct texts, beside rapidfuzz's own all-against-all with the same cutoff."""

from __future__ import annotations

import numpy as np
import polars as pl
from rapidfuzz import fuzz, process

from benchmarks.measure import SAMPLE, Row, cpu
from finetune_assets.corpus.near_duplicates import find_pairs, normalise


def rows(rounds: int) -> list[Row]:
    """6,000 short texts of the sample."""
    messages = pl.read_parquet(SAMPLE / "messages.parquet").drop_nulls("content")
    texts = normalise(messages["content"]).unique().sort().to_list()[:6000]
    find_pairs(texts[:200])  # compiles
    found: set[tuple[int, int]] = set()
    exact: set[tuple[int, int]] = set()

    def ours() -> None:
        pairs = find_pairs(texts)
        found.update(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))

    def theirs() -> None:
        for start in range(0, len(texts), 1000):
            scores = process.cdist(
                texts[start : start + 1000], texts, scorer=fuzz.ratio, score_cutoff=90, dtype=np.uint8, workers=1
            )
            left, right = np.nonzero(scores)
            exact.update((int(a) + start, int(b)) for a, b in zip(left, right, strict=True) if a + start < b)

    mine, peer = cpu(ours, rounds), cpu(theirs, 1)
    recall = len(found & exact) / max(len(exact), 1)
    note = f"recall {recall:.4f}, {len(found - exact)} false"
    return [Row("near-duplicate pairs, 6,000 short texts", mine, "rapidfuzz cdist", peer, note=note)]
