"""Train, validation and test: by a salted hash of the user, or by time, so that no example ever moves between them.

Which split a row is in depends on its own user (or its date) and the settings alone, never on the other rows. Near-duplicates in
different splits are removed afterwards (`duplicates.py`).
"""

from __future__ import annotations

import polars as pl

from finetune_assets.assistants.settings.data import Split

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS: tuple[str, ...] = (TRAIN, VALIDATION, TEST)
BUCKETS = 10_000


def assign(frame: pl.DataFrame, split: Split, tested: pl.Series | None = None) -> pl.DataFrame:
    """Adds `split`, and sets `reason` to `user_in_test` where a user of the test set has rows outside it.

    `frame` has bucket (0..9999), user (null: the conversation counts as one), started_at, and reason (null: kept so far). By
    time, a user is of the test set if any of the rows started on or after the date, even one that another rule drops: then a
    change of that rule moves nobody; where the frame has not all rows, `tested` are those users (see `testers`). Rows marked
    `user_in_test` get split `test`: their preferences stay out of training.
    """
    if split.mode == "user":
        return frame.with_columns(split=by_bucket(split.test, split.validation))
    late, users = _late(split), testers(frame, split) if tested is None else tested
    early_tester = ~late & pl.col("user").is_in(users.implode()).fill_null(False)
    rest = split.train + split.validation
    share = split.validation / rest if rest else 0.0
    return frame.with_columns(
        split=pl.when(late | early_tester).then(pl.lit(TEST)).otherwise(by_bucket(0, share)),
        reason=pl.when(pl.col("reason").is_null() & early_tester).then(pl.lit("user_in_test")).otherwise("reason"),
    )


def testers(frame: pl.DataFrame, split: Split) -> pl.Series:
    """Users with a usable row on or after the date of `split`; none where it has no date."""
    if split.mode == "user":
        return frame["user"].clear()
    used = ~pl.col("reason").is_in(["tenant_excluded", "no_consent", "simulated"]).fill_null(False)
    return frame.filter(_late(split) & used)["user"].drop_nulls().unique()


def _late(split: Split) -> pl.Expr:
    return pl.col("started_at") >= pl.lit(split.date).cast(pl.Datetime("us", "UTC"))


def by_bucket(test: float, validation: float) -> pl.Expr:
    """The first buckets are test, the next ones validation, the rest train."""
    bucket = pl.col("bucket").cast(pl.Int32)
    first, second = round(BUCKETS * test), round(BUCKETS * (test + validation))
    return pl.when(bucket < first).then(pl.lit(TEST)).when(bucket < second).then(pl.lit(VALIDATION)).otherwise(pl.lit(TRAIN))
