"""Preference pairs (correction over original reply, a rater's choice over the other reply) for DPO, and thumbs for KTO.

Who is in training and who is held out is the split of the examples. A row whose target is a twin of one on the other side is left
out: held-out rows that repeat a training example first, then training rows that repeat anything held out. A correction that is no
twin of another correction is never lost by this, since its own example survives every other twin.

What several people said of one message is one verdict (rules in `selection`): a correction makes a pair and a good row whatever
the thumbs say; the original is a bad row only where the newest thumb is down. Where two messages of the same context contradict
each other, a correction that calls a text good outweighs a thumb that calls it bad, and of two opposite pairs the newer counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from finetune_assets.dataset.duplicates import twins_in, with_text
from finetune_assets.dataset.lines import turns
from finetune_assets.dataset.ratings import Ratings, rated_pairs
from finetune_assets.dataset.selection import CORRECTED, NOTHING, POSITIVE, UNUSABLE, Left, holds_personal
from finetune_assets.dataset.splits import TRAIN

DUPLICATE = ("exact_duplicate", "near_duplicate", "semantic_duplicate")
NEGATIVE = "negative"


@dataclass(frozen=True)
class Pairs:
    """Rows of preferences and kto with the columns of the lineage, the normalised texts of the held-out ones, and how many were
    left out by reason."""

    preferences: pl.DataFrame
    kto: pl.DataFrame
    hidden: pl.Series
    left_out: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])


def make_pairs(
    frame: pl.DataFrame, kept: pl.DataFrame, threshold: float, left: Left = NOTHING, ratings: Ratings | None = None
) -> Pairs:
    """`frame` holds the examples of the assistant that somebody judged, with their final `reason` (null: kept), `split`,
    `source`, both replies and `context`; `kept` split and `text` (see `with_text`) of all that are kept; `ratings` adds the pairs
    of which raters chose one."""
    counts: dict[str, dict[str, int]] = {}
    heldout, train = pl.col("split") != TRAIN, pl.col("split") == TRAIN
    rows = {"preferences": _preferences(frame, ratings or Ratings()), "kto": _thumbs(frame)}
    texts = {"preferences": "chosen", "kto": "completion"}
    for kind, made in rows.items():
        counts[kind] = {}
        personal = holds_personal(made, [texts[kind], *(["rejected"] if kind == "preferences" else [])], left)
        made = with_text(_without(made, personal, "personal_data_residual", counts[kind]), texts[kind])  # noqa: PLW2901
        equal = ~made.select(pl.struct("context", texts[kind], "split", *_says(kind)).is_first_distinct()).to_series()
        made = _without(made, equal, "equal_row", counts[kind])  # noqa: PLW2901
        rows[kind] = _without(made, _contradicted(kind, made), "contradicted", counts[kind])
    examples = kept.select("split", "text")
    rows = _apart(rows, heldout, examples.filter(train)["text"], "twin_in_training", threshold, counts)
    hidden = pl.concat([examples.filter(heldout)["text"], *[made.filter(heldout)["text"] for made in rows.values()]])
    rows = _apart(rows, train, hidden, "twin_held_out", threshold, counts)
    hidden = pl.concat([made.filter(heldout)["text"] for made in rows.values()])
    return Pairs(rows["preferences"].drop("text"), rows["kto"].drop("text"), hidden, {k: v for k, v in counts.items() if v})


def label_counts(kto: pl.DataFrame) -> dict[str, int]:
    """Good and bad training rows of KTO, by their split and source."""
    sources = kto.filter(pl.col("split") == TRAIN)["source"]
    bad = int((sources == NEGATIVE).sum())
    return {"good": len(sources) - bad, "bad": bad}


def _apart(
    rows: dict[str, pl.DataFrame],
    side: pl.Expr,
    others: pl.Series,
    reason: str,
    threshold: float,
    counts: dict[str, dict[str, int]],
) -> dict[str, pl.DataFrame]:
    """Without the rows of one side that are twins of `others`; both kinds are compared at once."""
    both = pl.concat([made.filter(side)["text"] for made in rows.values()]).unique().sort()
    twins = both.filter(pl.Series(twins_in(both, others, threshold) >= 0))
    for kind, made in rows.items():
        out = made.select(side & pl.col("text").is_in(twins.implode())).to_series()
        rows[kind] = _without(made, out, reason, counts[kind])
    return rows


def _preferences(frame: pl.DataFrame, ratings: Ratings) -> pl.DataFrame:
    """One pair for each correction that may be used, also where its example is a twin of another one; and those of raters."""
    fit = pl.col("reason").is_null() | pl.col("reason").is_in([*DUPLICATE, "user_in_test"])
    rows = frame.filter((pl.col("source") == CORRECTED) & fit)
    return _stable(pl.concat([rows.with_columns(chosen="reply", rejected="original"), rated_pairs(frame, ratings)]))


def _thumbs(frame: pl.DataFrame) -> pl.DataFrame:
    """Positive and corrected replies are true, negatively rated ones (also originals of corrections) false."""
    fit = pl.col("reason").is_null() | pl.col("reason").is_in([*DUPLICATE, "user_in_test"])
    good = frame.filter(pl.col("source").is_in([CORRECTED, POSITIVE]) & fit)
    bad = frame.filter((pl.col("verdict") == NEGATIVE) & ~pl.col("reason").is_in(UNUSABLE).fill_null(False))
    good = good.with_columns(completion="reply", label=pl.lit(True))
    bad = bad.with_columns(
        completion="original", label=pl.lit(False), source=pl.lit(NEGATIVE), replaced=pl.lit([], pl.List(pl.String))
    )
    return _stable(pl.concat([good, bad.select(good.columns)]))


def _contradicted(kind: str, rows: pl.DataFrame) -> pl.Series:
    """Rows that another one of the same context and texts speaks against; `rows` come newest first."""
    rows = rows.with_columns(history=turns())
    if kind == "kto":
        praised = pl.col("label").any().over("history", "completion")
        return rows.select(~pl.col("label") & praised).to_series()
    either = (pl.min_horizontal("chosen", "rejected").alias("one"), pl.max_horizontal("chosen", "rejected").alias("other"))
    newest = pl.col("chosen").first().over("history", "one", "other")
    return rows.with_columns(either).select(pl.col("chosen") != newest).to_series()


def _says(kind: str) -> list[str]:
    return ["rejected"] if kind == "preferences" else ["label"]


def _stable(rows: pl.DataFrame) -> pl.DataFrame:
    """Newest first, so that of two equal rows the newest one's ids stay."""
    return rows.sort("created_at", "source", "message_id", descending=[True, False, False])


def _without(rows: pl.DataFrame, out: pl.Series, reason: str, counts: dict[str, int]) -> pl.DataFrame:
    if out.any():
        counts[reason] = int(out.sum())
    return rows.filter(~out)
