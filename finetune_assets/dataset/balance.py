"""Evens out the training rows: caps of intents and tenants, and the share of negative examples.

Only rows that are kept so far and stand in train are dropped; validation and test measure what is really asked. Of an intent the
better source stays (corrected, positive, satisfied, imported), within a source the smaller hash of the text, so neither the order
of rows nor their ids matter. The caps are applied in the order of the reasons: `intent_cap`, `tenant_cap`, `negative_share`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import polars as pl

from finetune_assets.assistants.settings.data import Balance
from finetune_assets.corpus.near_duplicates import exact_keys
from finetune_assets.dataset.duplicates import Whole
from finetune_assets.dataset.selection import SOURCES, matches
from finetune_assets.dataset.splits import TRAIN
from finetune_assets.errors import DataError

SOURCE_RANK = {name: place for place, name in enumerate(SOURCES)}


def best_first(rows: pl.DataFrame) -> pl.DataFrame:
    """Sorted by source, then by a hash of user turn and reply; ids decide only between rows of equal text."""
    both = rows.select(pl.concat_str("user_text", "reply", separator="\n")).to_series()
    rank = pl.col("source").replace_strict(SOURCE_RANK, return_dtype=pl.Int8)
    key = pl.Series(exact_keys(both.to_list()), dtype=pl.UInt64)
    return rows[rows.select(pl.arg_sort_by(rank, key, "message_id")).to_series()]


def cap_of(counts: Sequence[int], cap: float, setting: str) -> int:
    """The most rows of a group: the number itself, or the largest c with c ≤ share · Σ min(count, c).

    Raises DataError where so few groups cannot hold the share.
    """
    if cap >= 1:
        return int(cap)
    sizes = sorted(counts)
    best = done = below = 0
    for place, size in enumerate(sizes):
        # With c above `below` and up to `size`: Σ min = done + c · (groups from here on).
        above = len(sizes) - place
        slope = 1 - cap * above
        fits = size if slope <= 0 else min(size, math.floor(cap * done / slope + 1e-9))
        if fits > below:
            best = fits
        done, below = done + size, size
    if best < 1:
        raise DataError(
            f"{setting} is {cap:g}, but there are {len(sizes)} groups: the largest holds at least {1 / len(sizes):.2g} of the "
            "rows. Raise it, or give a number of rows instead of a share."
        )
    return best


def is_negative(rows: pl.DataFrame, balance: Balance) -> pl.Series:
    """True for requests that the assistant declines or hands over, as the settings recognise them."""
    found = rows["intent"].is_in(balance.negative_intents).fill_null(False)
    for pattern in balance.negative_patterns:
        found = found | matches(rows["reply"], pattern)
    return found


def even_out(frame: pl.DataFrame, balance: Balance, whole: Whole) -> pl.DataFrame:
    """Fills `reason` of the training rows above a cap. `frame` has reason (null: kept so far), `whole` gives the rest."""
    if balance.max_per_intent is None and balance.max_per_tenant is None and balance.negative_share is None:
        return frame
    rows = best_first(whole(frame.filter(pl.col("reason").is_null() & (pl.col("split") == TRAIN))))
    rows = rows.with_columns(why=pl.lit(None, pl.String))
    for column, cap, name in (
        ("intent", balance.max_per_intent, "intent_cap"),
        ("tenant_id", balance.max_per_tenant, "tenant_cap"),
    ):
        left = rows.filter(pl.col("why").is_null())
        if cap is not None and not left.is_empty():
            setting = f"balance.max_per_{column.removesuffix('_id')}"
            most = cap_of(left[column].value_counts()["count"].to_list(), cap, setting)
            rows = _drop(rows, left.filter(pl.int_range(pl.len()).over(column) >= most), name)
    if balance.negative_share is not None:
        left = rows.filter(pl.col("why").is_null())
        negative = is_negative(left, balance)
        others = int((~negative).sum())
        most = math.floor(balance.negative_share / (1 - balance.negative_share) * others + 1e-9)
        rows = _drop(rows, left.filter(negative)[most:], "negative_share")
    decided = rows.drop_nulls("why").select("place", pl.col("why").cast(frame.schema["reason"]))
    return (
        frame.join(decided, on="place", how="left", maintain_order="left")
        .with_columns(reason=pl.coalesce("reason", "why"))
        .drop("why")
    )


def _drop(rows: pl.DataFrame, out: pl.DataFrame, reason: str) -> pl.DataFrame:
    gone = pl.col("place").is_in(out["place"].implode())
    return rows.with_columns(why=pl.when(gone).then(pl.lit(reason)).otherwise("why"))


def negatives_note(kept: pl.DataFrame, balance: Balance) -> dict[str, float | int] | None:
    """How many training rows are negative examples, and their share; None where no setting recognises any."""
    if not balance.negative_intents and not balance.negative_patterns:
        return None
    train = kept.filter(pl.col("split") == TRAIN)
    count = int(is_negative(train, balance).sum())
    return {"rows": count, "share": round(count / max(train.height, 1), 4)}
