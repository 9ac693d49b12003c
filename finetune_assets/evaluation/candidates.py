"""Who is compared: each candidate is a model and a way to ask it. All get the same frozen test rows.

A later candidate (retrieval, champion, a remote model) is another class with `name`, `model` and `prompt`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import polars as pl

from finetune_assets.dataset.formats import read_lines
from finetune_assets.errors import DataError

Message = dict[str, str]
BASE, FEW_SHOT, TUNED = "base", "few_shot", "tuned"


class Candidate(Protocol):
    """A model and a way to ask it."""

    @property
    def name(self) -> str:
        """Key in the report."""
        ...

    @property
    def model(self) -> str:
        """Folder or Hugging Face id."""
        ...

    def prompt(self, messages: Sequence[Message]) -> list[Message]:
        """What the model is asked: `messages` ends with the user's turn."""
        ...


@dataclass(frozen=True)
class Plain:
    """The model as it is served: the conversation, nothing more."""

    name: str
    model: str

    def prompt(self, messages: Sequence[Message]) -> list[Message]:
        """The messages themselves."""
        return list(messages)


@dataclass(frozen=True)
class FewShot:
    """The model with examples as earlier turns, after the system message. What does not fit into the context loses them first."""

    name: str
    model: str
    shots: tuple[tuple[str, str], ...]
    """(user turn, reply) of each example."""

    def prompt(self, messages: Sequence[Message]) -> list[Message]:
        """System message, examples, conversation."""
        turns = list(messages)
        system = [turns.pop(0)] if turns and turns[0]["role"] == "system" else []
        shown = [
            {"role": role, "content": text} for shot in self.shots for role, text in zip(("user", "assistant"), shot, strict=True)
        ]
        return [*system, *shown, *turns]


@dataclass(frozen=True)
class TestRow:
    """One row of the test set with its lineage."""

    __test__ = False  # no test class, whatever pytest thinks of the name

    messages: list[Message]
    """The prompt: system message, if any, to the user's last turn."""
    reference: str
    conversation_id: str
    message_id: str
    tenant_id: str
    intent: str

    @property
    def user_text(self) -> str:
        """The user's last turn."""
        return self.messages[-1]["content"] if self.messages else ""


def test_rows(dataset: Path, most: int) -> list[TestRow]:
    """The test rows with the `most` smallest hashes of their messages, in that order: rows that are added displace few others.

    Raises DataError for a test set without rows.
    """
    rows = _rows(dataset, "test")
    if not rows:
        raise DataError(
            f"The data set {dataset} has no test rows, so nothing can be measured. "
            "Raise `split.test`, widen `window_weeks`, or add data."
        )
    return sorted(rows, key=lambda row: (_hash(row), row.message_id))[:most]


test_rows.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def choose_shots(dataset: Path, count: int) -> tuple[tuple[str, str], ...]:
    """Examples for the few-shot prompt, from the train split.

    One for each of the `count` most frequent intents (round again where there are fewer): among its single-turn examples (all
    of them where there is none) whose length is in the shorter half without its shortest half, the one with the smallest hash.
    So: typical, short, and the same in every run. The most frequent intent comes last, nearest to the question.
    """
    by_intent: dict[str, list[TestRow]] = {}
    for row in _rows(dataset, "train"):
        by_intent.setdefault(row.intent, []).append(row)
    frequent = sorted(by_intent, key=lambda intent: (-len(by_intent[intent]), intent))
    queues = {intent: _typical(by_intent[intent]) for intent in frequent}
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count and any(queues.values()):
        for intent in frequent:
            if len(chosen) < count and queues[intent]:
                row = queues[intent].pop(0)
                chosen.append((row.user_text, row.reference))
    return tuple(reversed(chosen))


def standard(dataset: Path, base_model: str, tuned_model: str, shots: int) -> list[Candidate]:
    """Base, base with few-shot examples, and the tuned model."""
    return [Plain(BASE, base_model), FewShot(FEW_SHOT, base_model, choose_shots(dataset, shots)), Plain(TUNED, tuned_model)]


def _typical(rows: list[TestRow]) -> list[TestRow]:
    alone = [row for row in rows if sum(m["role"] == "user" for m in row.messages) == 1] or rows
    by_length = sorted(alone, key=lambda row: (len(row.user_text) + len(row.reference), _hash(row), row.message_id))
    middle = by_length[len(by_length) // 4 : max(len(by_length) // 2, len(by_length) // 4 + 1)]
    return [*sorted(middle, key=lambda row: (_hash(row), row.message_id)), *(row for row in by_length if row not in middle)]


def _rows(dataset: Path, split: str) -> list[TestRow]:
    lineage = pl.read_parquet(dataset / "lineage.parquet").filter(pl.col("split") == split)
    where = {row["line"]: row for row in lineage.iter_rows(named=True)}
    rows: list[TestRow] = []
    for line, example in enumerate(read_lines(dataset / f"{split}.jsonl")):
        if line not in where:
            raise DataError(f"{dataset / f'{split}.jsonl'}:{line + 1} has no lineage; build the data set again (`jsonl_splits`).")
        of = where[line]
        *prompt, reply = example["messages"]
        ids = (str(of["conversation_id"]), str(of["message_id"]), str(of["tenant_id"]), str(of["intent"] or "unknown"))
        rows.append(TestRow(prompt, reply["content"], *ids))
    return rows


def _hash(row: TestRow) -> str:
    text = "\x1f".join([*(f"{m['role']}\x1e{m['content']}" for m in row.messages), row.reference])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def counts_by_intent(rows: Sequence[TestRow]) -> dict[str, int]:
    """Rows of each intent, most frequent first."""
    return dict(sorted(Counter(row.intent for row in rows).items(), key=lambda item: (-item[1], item[0])))
