"""Retrieval for the candidates that answer with help: what can be found, how it is ranked, and how the model is shown it.

Passages are training examples (a question and its reply) and the paragraphs of a folder of documents. A row is shown passages of
its own tenant, or of none: another clinic's address is never an answer. Ranking is BM25 (Robertson & Zaragoza 2009, Lucene's
variant), the cosine of sentence embeddings, or both by reciprocal rank fusion (Cormack, Clarke & Büttcher 2009).

Which retriever, how many passages and which template is chosen on the validation split, by `worker.retrieve`:
    retriever    the one whose best of MOST passages is nearest to the reference on average (word F1; no model is asked)
    k, template  the pair with the fewest bits per byte of the validation references, under the model that will answer
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.dataset.tool_calls import said
from finetune_assets.errors import SettingsError

Message = dict[str, Any]
Floats = NDArray[np.float64]
RETRIEVERS = ("bm25", "dense", "hybrid")
TEMPLATES = ("context", "turns")
COUNTS = (1, 3)
MOST = max(COUNTS)
K1, B = 1.2, 0.75
FUSION = 60  # the constant of the paper
PARAGRAPH = 700  # characters from which a document is cut at the next blank line
DOCUMENTS = (".md", ".txt")
HEADINGS = {"es": "Información que puede servir:", "en": "What may help:", "pt": "Informação que pode ajudar:"}


@dataclass(frozen=True)
class Passage:
    """One thing that can be found."""

    source: str
    """What is cited: `example:<message id>`, or `document:<file>#<paragraph>`."""
    tenant_id: str | None
    """Whose it is; null: everybody's."""
    query: str
    """What is searched."""
    question: str
    """User turn of an example; empty for a document."""
    text: str
    """What is shown."""


@dataclass(frozen=True)
class Choice:
    """How a model is asked with retrieval."""

    retriever: str
    k: int
    template: str


def query_of(messages: Sequence[Message]) -> str:
    """What is searched for: the user's last turn, and what the assistant said before it."""
    turns = [said(message) for message in messages if message["role"] != "system"]
    return "\n".join(turns[-2:])


def example(message_id: str, tenant_id: str, messages: Sequence[Message], reply: str) -> Passage:
    """A training example as a passage."""
    return Passage(f"example:{message_id}", tenant_id, query_of(messages), said(messages[-1]), reply)


def documents(folder: Path) -> list[Passage]:
    """Paragraphs of the .md and .txt files: `<folder>/<tenant>/…` is that tenant's, `<folder>/…` everybody's.

    Raises SettingsError where the folder is missing.
    """
    if not folder.is_dir():
        raise SettingsError(f"benchmark.documents: {folder} is no folder; correct the path, or leave the setting out.")
    made: list[Passage] = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix in DOCUMENTS and path.is_file()):
        inside = file.relative_to(folder)
        tenant = inside.parts[0] if len(inside.parts) > 1 else None
        for n, text in enumerate(paragraphs(file.read_text(encoding="utf-8", errors="replace"))):
            made.append(Passage(f"document:{inside}#{n + 1}", tenant, text, "", text))
    return made


def paragraphs(text: str) -> list[str]:
    """A document in pieces of whole paragraphs; one ends with the first that takes it over PARAGRAPH characters."""
    pieces: list[str] = []
    open_piece = ""
    for paragraph in (part.strip() for part in re.split(r"\n\s*\n", text)):
        open_piece = f"{open_piece}\n{paragraph}".strip()
        if len(open_piece) >= PARAGRAPH:
            pieces.append(open_piece)
            open_piece = ""
    return [*pieces, open_piece] if open_piece else pieces


class Bm25:
    """Scores of every passage for a query."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        self.size = len(texts)
        lengths = np.array([sum(count.values()) for count in counts], np.float64)
        norm = K1 * (1 - B + B * lengths / max(lengths.mean() if self.size else 1.0, 1.0))
        found: dict[str, list[tuple[int, int]]] = {}
        for n, count in enumerate(counts):
            for word, times in count.items():
                found.setdefault(word, []).append((n, times))
        self.postings: dict[str, tuple[NDArray[np.int64], Floats]] = {}
        for word, places in found.items():
            rows = np.array([n for n, _ in places], np.int64)
            times = np.array([t for _, t in places], np.float64)
            weight = math.log(1 + (self.size - len(places) + 0.5) / (len(places) + 0.5))
            self.postings[word] = rows, weight * times / (times + norm[rows])

    def scores(self, query: str) -> Floats:
        """[passages]; 0 where no word is shared."""
        total = np.zeros(self.size)
        for word in set(words(query)):
            if word in self.postings:
                rows, weights = self.postings[word]
                total[rows] += weights
        return total


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())


def top(scores: Floats, allowed: NDArray[np.bool_], k: int) -> list[int]:
    """The `k` best allowed passages, best first; equal scores in the order of the passages."""
    order = np.argsort(np.where(allowed, -scores, np.inf), kind="stable")
    return [int(n) for n in order[:k] if allowed[n]]


def fuse(*scores: Floats) -> Floats:
    """Reciprocal rank fusion."""
    fused = np.zeros(len(scores[0]))
    for one in scores:
        rank = np.empty(len(one))
        rank[np.argsort(-one, kind="stable")] = np.arange(1, len(one) + 1)
        fused += 1 / (FUSION + rank)
    return fused


def insert(messages: Sequence[Message], passages: Sequence[Passage], template: str, language: str) -> list[Message]:
    """The prompt with what was found. `context`: in the system message; `turns`: examples as earlier turns, the best one last.

    Documents always stand in the system message.
    """
    turns = [dict(message) for message in messages]
    system = turns.pop(0) if turns and turns[0]["role"] == "system" else {"role": "system", "content": ""}
    shown = [p for p in passages if p.question and template == "turns"]
    listed = [p for p in passages if p not in shown]
    if listed:
        lines = "\n".join(f"- {p.question} → {p.text}" if p.question else f"- {p.text}" for p in listed)
        heading = HEADINGS.get(language, HEADINGS["en"])
        system["content"] = f"{system['content']}\n\n{heading}\n{lines}".strip()
    earlier = [
        {"role": role, "content": text} for p in reversed(shown) for role, text in (("user", p.question), ("assistant", p.text))
    ]
    return [*([system] if system["content"] else []), *earlier, *turns]


def word_f1(text: str, reference: str) -> float:
    """Harmonic mean of the shares of words that two texts have in common (SQuAD's F1)."""
    a, b = Counter(words(text)), Counter(words(reference))
    same = sum((a & b).values())
    return 2 * same / (sum(a.values()) + sum(b.values())) if same else 0.0


def best_retriever(found: Mapping[str, Sequence[Sequence[Passage]]], references: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The retriever with the highest mean of the best passage's word F1 with the reference, and every mean. Ties: first."""

    def nearest(row: Sequence[Passage], reference: str) -> float:
        return max((word_f1(passage.text, reference) for passage in row), default=0.0)

    means = {
        name: sum(nearest(row, reference) for row, reference in zip(rows, references, strict=True)) / max(len(rows), 1)
        for name, rows in found.items()
    }
    return max(means, key=lambda name: means[name]), means
