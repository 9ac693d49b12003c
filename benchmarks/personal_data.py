"""Personal data of all conversations, beside the same recognisers run on every text without the prefilter."""

from __future__ import annotations

import polars as pl

from benchmarks.measure import SAMPLE, Row, cpu
from finetune_assets.corpus.personal_data import find, needs_look


def rows(rounds: int) -> list[Row]:
    """The sample's messages."""
    texts = pl.read_parquet(SAMPLE / "messages.parquet").drop_nulls("content")["content"]
    find("llámame al +34 612 345 678")

    def ours() -> int:
        return sum(len(find(text)) for text in texts.filter(needs_look(texts)))

    def theirs() -> int:
        return sum(len(find(text)) for text in texts)

    note = f"same finds: {ours() == theirs()}"
    mine, peer = cpu(ours, rounds), cpu(theirs, rounds)
    return [Row(f"personal data, {len(texts):,} messages", mine, "same recognisers, no prefilter", peer, note=note)]
