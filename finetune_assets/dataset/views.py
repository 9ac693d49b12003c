"""What a data engineer looks at: sample rows, dropped rows, twins side by side, rows over the weeks."""

from __future__ import annotations

import hashlib
from typing import Any

import polars as pl
from rapidfuzz import fuzz

from finetune_assets.corpus.near_duplicates import normalise
from finetune_assets.dataset.coverage import sample
from finetune_assets.dataset.duplicates import Whole

OTHER = "other"
TWINS = ("near_duplicate", "semantic_duplicate", "same_as_negative", "exact_duplicate")


def sample_rows(kept: pl.DataFrame, n: int = 5) -> list[dict[str, Any]]:
    """A few kept examples (split, source, intent, texts, message_id); the same ones for the same content."""
    columns = ("split", "source", "intent", "user_text", "reply", "message_id")
    keyed = [(_hash(f"{row['user_text']}\n{row['reply']}"), row) for row in sample(kept, 500).select(columns).to_dicts()]
    return [row for _, row in sorted(keyed, key=lambda pair: (pair[0], pair[1]["message_id"]))[:n]]


def dropped_rows(frame: pl.DataFrame, each: int = 2) -> list[dict[str, Any]]:
    """A few dropped examples of every reason (reason, user_text, reply, message_id), chosen by a hash of their ids.

    `frame` has every example with its final reason.
    """
    return some_dropped(frame, each).select("reason", "user_text", "reply", "message_id").to_dicts()


def some_dropped(frame: pl.DataFrame, each: int = 2) -> pl.DataFrame:
    """The rows that `dropped_rows` gives, of any part of the examples: the same for the rest of them and these few."""
    dropped = frame.filter(pl.col("reason").is_not_null())
    order = dropped.select("reason", key=pl.col("message_id").hash(0), row=pl.int_range(pl.len())).sort("reason", "key")
    return dropped[order.filter(pl.int_range(pl.len()).over("reason") < each)["row"]]


def outcomes_by_week(frame: pl.DataFrame) -> dict[str, dict[str, int]]:
    """Every example by the week of its conversation: `kept`, or the reason why it was dropped."""
    return by_week(frame.with_columns(outcome=pl.coalesce(pl.col("reason").cast(pl.String), pl.lit("kept"))), "outcome", most=7)


def twin_rows(frame: pl.DataFrame, whole: Whole, n: int = 8) -> list[dict[str, Any]]:
    """Removed examples beside what they are twins of: reason, similarity (0..1), kept and removed text, both message ids.

    `frame` has every example with its final reason, `whole` gives the texts. Chosen by a hash of the ids, near-duplicates first:
    they show the threshold.
    """
    removed = frame.filter(pl.col("reason").is_in(TWINS)).select("reason", "message_id", "kept_message_id")
    order = pl.col("reason").replace_strict({name: place for place, name in enumerate(TWINS)}, return_dtype=pl.Int8)
    ids = pl.Series([_hash(message) for message in removed["message_id"]], dtype=pl.String)
    parts = removed.with_columns(_order=order, _hash=ids).sort("_order", "_hash")
    share = {
        "near_duplicate": n - n // 4 - n // 8,
        "semantic_duplicate": n // 4,
        "same_as_negative": n // 4,
        "exact_duplicate": n // 8,
    }
    chosen = pl.concat([parts.filter(pl.col("reason") == reason).head(most) for reason, most in share.items()])
    named = pl.concat([chosen["message_id"], chosen["kept_message_id"]]).implode()
    texts = whole(frame.filter(pl.col("message_id").is_in(named))).select("message_id", "user_text", "reply", "original")
    twins = texts.select(kept_message_id="message_id", kept_user="user_text", kept_reply="reply", said="original")
    both = chosen.join(texts.drop("original"), on="message_id", how="left", maintain_order="left")
    both = both.join(twins, on="kept_message_id", how="left", maintain_order="left")
    rows: list[dict[str, Any]] = []
    for row in both.to_dicts():
        kept_reply = row["said"] if row["reason"] == "same_as_negative" else row["kept_reply"]
        kept, gone = f"{row['kept_user']}\n{kept_reply}", f"{row['user_text']}\n{row['reply']}"
        one, two = normalise(pl.Series([kept, gone])).to_list()
        rows.append(
            {
                "reason": row["reason"],
                "similarity": round(fuzz.ratio(one, two) / 100, 3),
                "kept": kept,
                "removed": gone,
                "kept_message_id": row["kept_message_id"],
                "message_id": row["message_id"],
            }
        )
    return rows


def vocabulary_rows(notes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The notes of `coverage.vocabulary_notes` as rows of a table."""
    return [{"side": side, **numbers} for side, numbers in notes.items()]


def by_week(kept: pl.DataFrame, column: str, most: int = 6) -> dict[str, dict[str, int]]:
    """Examples by week of their conversation and value of a column; values after the `most` - 1 most frequent are `other`."""
    frequent = [value for value, _ in kept[column].value_counts().sort("count", column, descending=[True, False]).rows()]
    shown = frequent if len(frequent) <= most else frequent[: most - 1]
    week = pl.col("started_at").dt.truncate("1w")
    value = pl.when(pl.col(column).is_in(shown)).then(pl.col(column)).otherwise(pl.lit(OTHER))
    counted = kept.group_by(week.alias("week"), value.alias("value")).len().sort("week")
    counted = counted.with_columns(pl.col("week").dt.strftime("%Y-%m-%d"))
    names = [*shown, *([OTHER] if len(frequent) > len(shown) else [])]
    weeks: dict[str, dict[str, int]] = {}
    for when, name, count in counted.rows():
        weeks.setdefault(str(when), dict.fromkeys(names, 0))[str(name)] = int(count)
    return weeks


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
