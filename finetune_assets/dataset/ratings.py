"""What raters said, as the data set takes it: pairs of replies of which one won, and training examples that were rejected.

A pair becomes a DPO row with the context and the split of its message, so pairs of test prompts are held out like everything
else of their user. An example that was rejected in a review is no target (`rejected_in_review`), a correction too, nor is any
reply that nearly repeats it; a newer correction of the same message is another text, and counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from finetune_assets.corpus.schema import TIME, TURN
from finetune_assets.dataset.selection import UNUSABLE

RATED = "rated"
"""The source of a pair of which raters chose one."""
REJECTED = "rejected_in_review"

_PAIRS = pl.Schema(
    {"message_id": pl.String, "context": pl.List(TURN), "chosen": pl.String, "rejected": pl.String, "rated_at": TIME}
)
_REJECTED = pl.Schema({"message_id": pl.String, "rejected_text": pl.String})


@dataclass(frozen=True)
class Ratings:
    """`pairs`: message_id, context, chosen, rejected, rated_at. `rejected`: message_id and the text that was refused."""

    pairs: pl.DataFrame = field(default_factory=_PAIRS.to_frame)
    rejected: pl.DataFrame = field(default_factory=_REJECTED.to_frame)

    @classmethod
    def of(cls, pairs: list[tuple[object, ...]], rejected: list[tuple[str, str]]) -> Ratings:
        """From rows, in the order of the columns."""
        return cls(pl.DataFrame(pairs, schema=_PAIRS, orient="row"), pl.DataFrame(rejected, schema=_REJECTED, orient="row"))


def mark_rejected(frame: pl.DataFrame, ratings: Ratings) -> pl.DataFrame:
    """Sets `reason` where the target is what a reviewer refused; `frame` has message_id, reply and reason."""
    if ratings.rejected.is_empty():
        return frame
    texts = ratings.rejected.group_by("message_id").agg("rejected_text")
    joined = frame.join(texts, on="message_id", how="left", maintain_order="left")
    refused = pl.col("rejected_text").list.contains(pl.col("reply").str.strip_chars()).fill_null(False)
    reason = pl.when(pl.col("reason").is_null() & refused).then(pl.lit(REJECTED)).otherwise("reason")
    return joined.with_columns(reason=reason).drop("rejected_text")


def rated_pairs(frame: pl.DataFrame, ratings: Ratings) -> pl.DataFrame:
    """The pairs as rows of `frame`, with chosen and rejected; those of messages that are not the assistant's are left out."""
    usable = ~pl.col("reason").is_in(UNUSABLE).fill_null(False)
    rated = pl.col("message_id").is_in(ratings.pairs["message_id"].unique().implode())
    rows = frame.filter(usable & rated).drop("context").join(ratings.pairs, on="message_id", how="inner", maintain_order="left")
    return rows.with_columns(
        created_at="rated_at", source=pl.lit(RATED), replaced=pl.lit([], pl.List(pl.String)), reason=pl.lit(None, pl.String)
    ).select(*frame.columns, "chosen", "rejected")
