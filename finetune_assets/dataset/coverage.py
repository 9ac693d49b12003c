"""How varied the training rows are, how well they cover what people really ask, and how far they moved since the last data set.

Counts of distinct words grow with the number of rows, so texts are compared on samples of a fixed size, chosen by hash. Words are
those of the normalised text (see `near_duplicates.normalise`). Distances are Jensen-Shannon divergences in bits (Lin, 1991,
doi:10.1109/18.61115): 0 for equal distributions, 1 where nothing is shared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from finetune_assets.corpus.near_duplicates import normalise
from finetune_assets.dataset.formats import FILES, read_targets
from finetune_assets.dataset.manifest import read_manifest, tally
from finetune_assets.dataset.splits import TRAIN

SAMPLE = 5_000
"""Most texts that a measure of words looks at."""
Counts = dict[str, int]


def words(texts: pl.Series) -> pl.DataFrame:
    """One row a word, in order: `row` and `word`."""
    split = normalise(texts).str.split(" ").alias("word")
    return split.to_frame().with_row_index("row").explode("word").filter(pl.col("word").fill_null("") != "")


def divergence(one: Counts, other: Counts) -> float:
    """Jensen-Shannon divergence of two counts, in bits; 1 where just one of them is empty."""
    keys = sorted(one.keys() | other.keys())
    if not keys:
        return 0.0
    p, q = (np.array([counts.get(key, 0) for key in keys], dtype=float) for counts in (one, other))
    if not p.sum() or not q.sum():
        return 1.0
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(side > 0, side * np.log2(side / middle), 0.0).sum() for side in (p, q)]
    return float(np.clip(sum(parts) / 2, 0.0, 1.0))


def diversity(texts: pl.Series) -> dict[str, float | int]:
    """Texts, words, distinct words, and distinct-1 and distinct-2: distinct words (pairs of neighbours) over all of them.

    distinct-n is Li et al.'s (2016, arXiv:1510.03055); distinct-1 is the type-token ratio.
    """
    found = words(texts)
    pairs = found.select("row", "word", then=pl.col("word").shift(-1).over("row")).drop_nulls("then")
    types, distinct_pairs = (
        found["word"].n_unique(),
        pairs.select(pl.struct("word", "then").n_unique()).item() if pairs.height else 0,
    )
    return {
        "texts": len(texts),
        "words": found.height,
        "vocabulary": types,
        "distinct_1": round(types / max(found.height, 1), 4),
        "distinct_2": round(distinct_pairs / max(pairs.height, 1), 4),
    }


def vocabulary_notes(kept: pl.DataFrame) -> dict[str, Any]:
    """Diversity of the user turns and replies of a sample of the training rows."""
    train = sample(_train(kept))
    return {"user": diversity(train["user_text"]), "reply": diversity(train["reply"])}


def coverage(intents: pl.Series, live: pl.DataFrame, kept: pl.DataFrame) -> dict[str, Any]:
    """How well the training rows stand for everything the assistant was asked in its window: `intents` of all examples, and
    `live`, at least a `sample` of them.

    `intent_divergence` and `word_divergence` of live user turns and those of train; `words_covered`: the share of live words
    (each as often as it occurs) that occur in train; `intents_missing`: those without a training row, with their live examples.
    """
    train = _train(kept)
    asked, learnt = tally(intents), tally(train["intent"])
    live_words = tally(words(sample(live)["user_text"])["word"])
    train_words = tally(words(sample(train)["user_text"])["word"])
    known = {word for part in train.select("user_text").iter_slices(50_000) for word in words(part["user_text"])["word"].unique()}
    total = sum(live_words.values())
    return {
        "intent_divergence": round(divergence(asked, learnt), 4),
        "intents_missing": {intent: n for intent, n in asked.items() if intent not in learnt},
        "word_divergence": round(divergence(live_words, train_words), 4),
        "words_covered": round(sum(n for word, n in live_words.items() if word in known) / max(total, 1), 4),
    }


def _train(kept: pl.DataFrame) -> pl.DataFrame:
    return kept.select("split", "intent", "text_key", "user_text", "reply").filter(pl.col("split") == TRAIN)


def sample(rows: pl.DataFrame, most: int = SAMPLE) -> pl.DataFrame:
    """At most so many rows: those of the smallest text keys, so that rows that are added displace few others."""
    return rows if rows.height <= most else rows.bottom_k(most, by=["text_key", "user_text", "reply"])


def drift(before: Path, after: Path) -> dict[str, Any]:
    """How far the training rows of a frozen data set are from an older one's.

    Rows added and removed (by message), the divergence of intents, and of the words of user turns and of replies. `noise` is the
    divergence of words between two halves of the newer sample: what chance alone makes of samples of half the size.
    """
    old, new = read_manifest(before), read_manifest(after)
    ids = [set(pl.read_parquet(f / "lineage.parquet", columns=["message_id"])["message_id"]) for f in (before, after)]
    first, second = _sample_of(before), _sample_of(after)
    halves = (second.gather_every(2), second.gather_every(2, 1))
    intents = [
        {intent: sizes[TRAIN] for intent, sizes in m["counts"]["intent_by_split"].items() if sizes.get(TRAIN)} for m in (old, new)
    ]
    return {
        "against": before.name,
        "rows_added": len(ids[1] - ids[0]),
        "rows_removed": len(ids[0] - ids[1]),
        "intents": round(divergence(*intents), 4),
        **{f"{what}_words": _word_divergence(first, second, column) for what, column in _TEXT.items()},
        **{f"{what}_words_noise": _word_divergence(*halves, column) for what, column in _TEXT.items()},
    }


_TEXT = {"user": "user_text", "reply": "reply"}


def _sample_of(folder: Path) -> pl.DataFrame:
    """Targets of the first lines of train.jsonl, which stand in the order of a hash."""
    return read_targets(folder, next(spec for spec in FILES if spec.name == "train.jsonl"), SAMPLE)


def _word_divergence(one: pl.DataFrame, other: pl.DataFrame, column: str) -> float:
    return round(divergence(*(tally(words(part[column])["word"]) for part in (one, other))), 4)
