"""Examples that say the same in other words: cosine of sentence embeddings at or above `filters.semantic_duplicate`.

Optional, after near-duplicates and in the same order of who survives. Encoding costs about 8,000 times as much as comparing
letters, so it runs in a child process (bf16 where the processor has it, each distinct text once), which alone imports torch.
Cosines of another processor or library version may differ by some thousandths: near the threshold so may the choice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from finetune_assets.dataset.duplicates import Indices
from finetune_assets.storage import TEMPORARY, write_json

Floats = npt.NDArray[np.float32]
Embed = Callable[[list[str]], Floats]
"""Texts to unit vectors `[texts, dimensions]`."""
BLOCK = 256  # rows compared at a time: 100 MB of cosines with 100,000 kept ones


def embedding(launch: Callable[[Path, Path], None], folder: Path, model: str | None) -> Embed:
    """Encodes in a child process; `launch(spec file, output folder)` runs it. The texts are removed with it."""

    def embed(texts: list[str]) -> Floats:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{TEMPORARY}embed-") as name:
            output = Path(name)
            write_json(output / "texts.json", texts)
            spec = {
                "task": "embed",
                "output": str(output),
                "texts": str(output / "texts.json"),
                "similarity_model": model,
                "setting": "filters.semantic_model",
            }
            write_json(output / "spec.json", spec)
            launch(output / "spec.json", output)
            return np.load(output / "embeddings.npy")

    return embed


def drop_same_meaning(decided: pl.DataFrame, embed: Embed, threshold: float) -> pl.DataFrame:
    """`decided` as `remove_twins` gives it, with the reason `semantic_duplicate` added among its survivors.

    What was removed for one of those before now names the one that is left.
    """
    free = np.flatnonzero(decided["reason"].is_null().to_numpy())
    survivors = decided.select("message_id", text=pl.concat_str("user_text", "reply", separator="\n"))[free.tolist()]
    if survivors.is_empty():
        return decided
    kept_by = walk(embed(survivors["text"].to_list()), threshold)
    ids = survivors["message_id"]
    dropped = np.flatnonzero(kept_by >= 0)
    moved = dict(zip(ids.gather(dropped).to_list(), ids.gather(kept_by[dropped]).to_list(), strict=True))
    same = pl.col("message_id").is_in(list(moved))
    return decided.with_columns(
        reason=pl.when(same).then(pl.lit("semantic_duplicate")).otherwise("reason"),
        kept_message_id=pl.when(same)
        .then(pl.col("message_id").replace_strict(moved, default=None, return_dtype=pl.String))
        .otherwise(pl.col("kept_message_id").replace(moved)),
    )


def walk(vectors: Floats, threshold: float) -> Indices:
    """From the first row on, a row is dropped for the first kept one within the threshold: its place, -1 for kept."""
    kept_by = np.full(len(vectors), -1, dtype=np.int64)
    kept = np.empty(0, dtype=np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        if len(kept):
            near = block @ vectors[kept].T >= threshold
            hit = near.any(axis=1)
            kept_by[start : start + len(block)][hit] = kept[near.argmax(axis=1)[hit]]
        inside = block @ block.T >= threshold
        free: list[int] = []
        for row in np.flatnonzero(kept_by[start : start + len(block)] < 0).tolist():
            partner = next((other for other in free if inside[row, other]), None)
            if partner is None:
                free.append(row)
            else:
                kept_by[start + row] = start + partner
        kept = np.concatenate([kept, start + np.asarray(free, dtype=np.int64)])
    return kept_by
