"""Twins: examples whose normalised user turn and reply are equal or near-equal. One survives, and it says whom it replaced.

A reply that equals or nearly equals a negatively rated one is dropped, unless a person wrote it as a correction. Of the others
the first in this order survives: a correction, then test, validation, train (so train never holds a twin of a held-out row),
then the better source, then the newest, then by content. The order of rows in the corpus never matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import polars as pl

from finetune_assets.corpus.near_duplicates import drop_near_duplicates, normalise, pairs_between, signatures
from finetune_assets.dataset.ratings import REJECTED
from finetune_assets.dataset.selection import CORRECTED, SOURCES, UNUSABLE
from finetune_assets.dataset.splits import TEST, TRAIN, VALIDATION

AT_ONCE = 100_000  # texts that are compared with others
Indices = npt.NDArray[np.int64]
Contexts = Callable[[pl.DataFrame], Iterable[pl.DataFrame]]
"""Gives some rows, in parts, with their contexts."""
Whole = Callable[[pl.DataFrame], pl.DataFrame]
"""Gives some rows with their texts, and all else of an example but the context."""


def with_text(frame: pl.DataFrame, reply: str) -> pl.DataFrame:
    """Adds `text`: the normalised user turn and reply, which is what two examples are compared by."""
    raw = frame.select(pl.concat_str("user_text", reply, separator="\n")).to_series()
    return frame.with_columns(normalise(raw).alias("text"))


def blocking_negatives(frame: pl.DataFrame) -> pl.DataFrame:
    """message_id, created_at and text of the replies (as said) that no other reply may repeat: rated badly, or corrected,
    and targets that a reviewer refused."""
    rated = (pl.col("verdict") == "negative").fill_null(False) | (pl.col("source") == CORRECTED).fill_null(False)
    usable = ~pl.col("reason").is_in(UNUSABLE).fill_null(False)
    refused = with_text(frame.filter(pl.col("reason") == REJECTED), "reply")
    said = with_text(frame.filter(rated & usable), "original")
    return pl.concat([said, refused]).select("message_id", "created_at", "text")


def twins_in(some: pl.Series, others: pl.Series, threshold: float) -> Indices:
    """For each of `some` the first row of `others` whose text is equal, else the first that is near-equal; -1 for none."""
    if others.is_empty() or some.is_empty():
        return np.full(len(some), -1, dtype=np.int64)
    known = others.to_frame("text").with_row_index("equal").unique("text", keep="first", maintain_order=True)
    found = some.to_frame("text").join(known, on="text", how="left", maintain_order="left")
    new = found.filter(pl.col("equal").is_null())["text"].unique().sort()
    nearest = _nearest(new, known["text"], threshold)
    near = pl.DataFrame({"text": new, "near": known["equal"].gather(pl.Series(nearest).replace(-1, None))})
    found = found.join(near, on="text", how="left", maintain_order="left")
    return found.select(pl.coalesce("equal", "near").cast(pl.Int64).fill_null(-1)).to_series().to_numpy()


def _nearest(some: pl.Series, others: pl.Series, threshold: float) -> Indices:
    """For each of `some` the first near-equal one of `others`, -1 for none; both distinct. Of the longer side AT_ONCE are signed
    at a time."""
    swapped = len(some) < len(others)
    few, many = (some, others) if swapped else (others, some)
    signed, found = signatures(few, threshold), np.full(len(some), len(others), dtype=np.int64)
    for first in range(0, len(many), AT_ONCE):
        part = many[first : first + AT_ONCE]
        pairs = pairs_between(signatures(part, threshold), part, signed, few)
        rows = (pairs.right, pairs.left + first) if swapped else (pairs.left + first, pairs.right)
        np.minimum.at(found, *rows)
    return np.where(found < len(others), found, -1)


def ranked(frame: pl.DataFrame, whole: Whole, contexts: Contexts) -> pl.DataFrame:
    """Sorted so that of any two twins the one to keep comes first; ids decide only between rows that are equal in all else.

    Texts (`whole`) are asked for where rows are equal in all but those, and contexts where the texts are equal too.
    """
    order = {TEST: 0, VALIDATION: 1, TRAIN: 2}
    source = {name: place for place, name in enumerate(SOURCES)}
    frame = frame.with_columns(
        _fixed=pl.col("source") != CORRECTED,
        _split=pl.col("split").replace_strict(order, return_dtype=pl.Int8),
        _source=pl.col("source").replace_strict(source, return_dtype=pl.Int8, default=len(source)),
        _age=-pl.col("created_at").dt.epoch("us"),
    )
    keys = ["_fixed", "_split", "_source", "_age"]
    tied = whole(frame.filter(frame.select(pl.struct(keys).is_duplicated()).to_series()))
    said = pl.col("context").list.eval(pl.element().struct.field("content")).list.join("\n")
    alike = tied.filter(tied.select(pl.struct(*keys, "user_text", "reply").is_duplicated()).to_series())
    history = [part.select("message_id", _history=said) for part in contexts(alike)] if alike.height else []
    none = tied.clear().select("message_id", _history=pl.lit(None, pl.String))
    tied = tied.join(pl.concat([none, *history]), on="message_id", how="left")
    order = tied.sort("user_text", "reply", "_history", "message_id").select("message_id").with_row_index("_order")
    return frame.join(order, on="message_id", how="left").sort(*keys, "_order").drop(*keys, "_order")


def remove_twins(
    candidates: pl.DataFrame, negatives: pl.DataFrame, threshold: float, whole: Whole, contexts: Contexts
) -> pl.DataFrame:
    """The candidates, ranked, with `reason` and `kept_message_id` (null: survives).

    Both frames have message_id, created_at and text; candidates also place, expected, split and source.
    """
    frame = ranked(candidates, whole, contexts)
    newest = negatives.sort("created_at", "text", "message_id", descending=[True, False, False])
    corrected = (frame["source"] == CORRECTED).to_numpy()
    blocker = np.where(corrected, -1, twins_in(frame["text"], newest["text"], threshold))
    free = np.flatnonzero(blocker < 0)
    kept_by = drop_near_duplicates(frame["text"].gather(free), np.arange(len(free), dtype=np.int64), threshold)

    kept = np.full(frame.height, -1, dtype=np.int64)  # the row that stays for it
    kept[free] = np.where(kept_by >= 0, free[kept_by], -1)
    survivor, blocking = pl.Series(kept).replace(-1, None), pl.Series(blocker).replace(-1, None)
    blocked, dropped = blocking.is_not_null(), survivor.is_not_null()
    equal = frame["text"] == frame["text"].gather(survivor)
    return frame.with_columns(
        reason=pl.when(blocked)
        .then(pl.lit("same_as_negative"))
        .when(dropped & equal)
        .then(pl.lit("exact_duplicate"))
        .when(dropped)
        .then(pl.lit("near_duplicate")),
        kept_message_id=pl.coalesce(newest["message_id"].gather(blocking), frame["message_id"].gather(survivor)),
    )


def replaced_by(decided: pl.DataFrame) -> pl.DataFrame:
    """message_id of each survivor that has twins, and `replaced`: their message ids, sorted."""
    twins = decided.filter(pl.col("reason").is_in(["exact_duplicate", "near_duplicate", "semantic_duplicate"]))
    return twins.group_by(message_id="kept_message_id").agg(replaced=pl.col("message_id").sort())
