"""Finding passages for prompts, and choosing on the validation split how a model is asked with them, or with how many examples.

index = Index(passages, encode)               encode: texts -> unit vectors
index.find(query, tenant, "hybrid", 3)        passages, best first; their `source` is what a reply cites
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.evaluation.retrieval import (
    COUNTS,
    MOST,
    RETRIEVERS,
    TEMPLATES,
    Bm25,
    Choice,
    Passage,
    best_retriever,
    fuse,
    insert,
    query_of,
    top,
)

SHOTS = (1, 3)
"""Numbers of examples that are tried beside all of them."""
Encode = Callable[[Sequence[str]], NDArray[np.float32]]
Rows = list[dict[str, Any]]
Bits = Callable[[Sequence[Rows]], list[float]]
"""Bits per byte of the references of each of some lists of rows with `messages` and `reference`."""


class Index:
    """Passages, searchable."""

    def __init__(self, passages: Sequence[Passage], encode: Encode, vectors: NDArray[np.float32] | None = None) -> None:
        """`vectors`: unit rows of the passages' queries, where they are known from an earlier time."""
        self.passages = list(passages)
        self.encode = encode
        self.words = Bm25([passage.query for passage in self.passages])
        self.vectors = encode([passage.query for passage in self.passages]) if vectors is None else vectors
        self._asked: dict[str, NDArray[np.float32]] = {}
        self.tenants = np.array([passage.tenant_id or "" for passage in self.passages], dtype=object)

    def find(self, query: str, tenant: str | None, retriever: str, k: int) -> list[Passage]:
        """At most `k` passages that this tenant may see, best first."""
        if not self.passages:
            return []
        allowed = (self.tenants == "") | (self.tenants == (tenant or ""))
        dense = (self.vectors @ self._vector(query)).astype(np.float64) if retriever != "bm25" else None
        sparse = self.words.scores(query) if retriever != "dense" else None
        scores = [one for one in (sparse, dense) if one is not None]
        return [self.passages[n] for n in top(scores[0] if len(scores) == 1 else fuse(*scores), allowed, k)]

    def learn(self, queries: Sequence[str]) -> None:
        """Encodes queries together: one at a time takes ten times as long."""
        new = [query for query in dict.fromkeys(queries) if query not in self._asked]
        if new:
            self._asked |= dict(zip(new, self.encode(new), strict=True))

    def _vector(self, query: str) -> NDArray[np.float32]:
        self.learn([query])
        return self._asked[query]

    def ask(self, rows: Sequence[dict[str, Any]], choice: Choice, language: str) -> list[dict[str, Any]]:
        """The rows with passages in their messages, and what is cited as `sources`."""
        made: list[dict[str, Any]] = []
        self.learn([query_of(row["messages"]) for row in rows] if choice.retriever != "bm25" else [])
        for row in rows:
            found = self.find(query_of(row["messages"]), row.get("tenant_id"), choice.retriever, choice.k)
            asked = insert(row["messages"], found, choice.template, language)
            made.append({**row, "messages": asked, "sources": [passage.source for passage in found]})
        return made


def choose(index: Index, validation: Sequence[dict[str, Any]], bits: Bits, language: str) -> tuple[Choice, dict[str, Any]]:
    """The choice by the rule of `evaluation.retrieval`, and the numbers it was made on. Without validation rows: the last of
    the retrievers, one passage, the first template."""
    if not validation:
        return Choice(RETRIEVERS[-1], COUNTS[0], TEMPLATES[0]), {"rows": 0}
    index.learn([query_of(row["messages"]) for row in validation])
    found = {
        name: [index.find(query_of(row["messages"]), row.get("tenant_id"), name, MOST) for row in validation]
        for name in RETRIEVERS
    }
    retriever, nearness = best_retriever(found, [row["reference"] for row in validation])
    pairs = [(k, template) for k in COUNTS for template in TEMPLATES]
    ways = [index.ask(validation, Choice(retriever, k, template), language) for k, template in pairs]
    *found_bits, without = bits([*ways, list(validation)])
    tried = dict(zip(pairs, found_bits, strict=True))
    k, template = min(tried, key=lambda pair: tried[pair])
    numbers = {
        "rows": len(validation),
        "nearness": {name: round(value, 4) for name, value in nearness.items()},
        "bits_per_byte": {f"{k} {template}": _shown(value) for (k, template), value in tried.items()},
        "without": _shown(without),
    }
    return Choice(retriever, k, template), numbers


def choose_shots(count: int, validation: Rows, ask: Callable[[int], Rows], bits: Bits) -> tuple[int, dict[str, Any]]:
    """How many of `count` examples are shown: of SHOTS and all of them, what gives the references the fewest bits per byte; and
    the numbers it was chosen on. `ask`: the validation rows with so many examples. All, where there are no such rows."""
    counts = sorted({k for k in SHOTS if k < count} | {count})
    if not validation:
        return count, {"rows": 0}
    tried = dict(zip(counts, bits([ask(k) for k in counts]), strict=True))
    numbers = {"rows": len(validation), "bits_per_byte": {str(k): _shown(value) for k, value in tried.items()}}
    return min(tried, key=lambda k: tried[k]), numbers


def _shown(bits: float) -> float | None:
    """Null for a way that fits no row, which no JSON can write."""
    return round(bits, 5) if math.isfinite(bits) else None


def read_passages(path: Path) -> list[Passage]:
    """Passages as `prepare` wrote them."""
    return [Passage(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
