"""Texts to compare: what a person said and what the assistant answered, normalised and distinct, in Spanish and English.

The sample's turns come first, then those of the shared dialogues (where `../shared/data` is there), then single short messages.
More are made of them by a fixed seed: 20 to 70 % of the words of a text, replaced by words of others, so that they share
phrases as real texts do and few are copies; every tenth differs in one word only, and is one.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from benchmarks.measure import ROOT, SAMPLE
from finetune_assets.corpus.near_duplicates import normalise

SHARED = ROOT.parent / "shared" / "data"


def texts(number: int, seed: int = 1) -> list[str]:
    """So many distinct normalised texts in random order; the same for the same number and seed, and data that are there."""
    found = real_texts()
    draw = np.random.default_rng(seed)
    if number <= len(found):
        return [found[i] for i in draw.permutation(len(found))[:number]]
    made = dict.fromkeys(found)
    words = [text.split() for text in found]
    vocabulary = [word for some in words[:: max(1, len(words) // 20_000)] for word in some]
    while len(made) < number:
        picks = draw.integers(len(words), size=50_000)
        shares = np.where(draw.random(50_000) < 0.1, 0.0, draw.uniform(0.2, 0.7, 50_000))
        for pick, share in zip(picks.tolist(), shares.tolist(), strict=True):
            changed = list(words[pick])
            if not changed:
                continue
            places = draw.integers(len(changed), size=max(1, int(share * len(changed))))
            for place, other in zip(places.tolist(), draw.integers(len(vocabulary), size=len(places)).tolist(), strict=True):
                changed[place] = vocabulary[other]
            made[" ".join(changed)] = None
            if len(made) == number:
                break
    listed = list(made)
    return [listed[i] for i in draw.permutation(number)]


def real_texts() -> list[str]:
    """Every distinct text there is."""
    parts = [_turns(pl.read_parquet(SAMPLE / "messages.parquet"))]
    if (SHARED / "sgd").is_dir():
        parts.append(_turns(pl.read_parquet(SHARED / "sgd" / "messages.parquet")))
        general = pl.read_parquet(SHARED / "sgd_general.parquet").select(conversation_id="dialogue_id", messages="messages")
        general = general.explode("messages").unnest("messages").with_row_index("created_at")
        parts.append(_turns(general.with_columns(message_id=pl.lit(""))))
    whole = pl.concat([*(part["turn"] for part in parts), *(part["short"].drop_nulls() for part in parts)])
    return normalise(whole).unique(maintain_order=True).to_list()


def _turns(messages: pl.DataFrame) -> pl.DataFrame:
    """`turn`: a message of a user and the reply; `short`: the reply itself where it is short."""
    ordered = messages.drop_nulls("content").sort("conversation_id", "created_at", "message_id")
    said = ordered.with_columns(
        turn=pl.col("content").shift(1).over("conversation_id") + " " + pl.col("content"),
        short=pl.when(pl.col("content").str.len_chars() <= 55).then("content"),
    )
    return said.filter((pl.col("role") == "assistant") & pl.col("turn").is_not_null()).select("turn", "short")
