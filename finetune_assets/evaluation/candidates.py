"""Who is compared: each candidate is a model, here or behind an address, and a way to ask it. All get the same test rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from finetune_assets.assistants.settings.evaluation import Benchmark, EndpointSettings
from finetune_assets.dataset.formats import read_lines
from finetune_assets.dataset.tool_calls import said
from finetune_assets.errors import DataError
from finetune_assets.evaluation.rented import address

Message = dict[str, Any]
BASE, FEW_SHOT, RAG, CHAMPION, TUNED, TUNED_RAG = "base", "few_shot", "rag", "champion", "tuned", "tuned_rag"
ORDER = (BASE, FEW_SHOT, RAG, CHAMPION, TUNED, TUNED_RAG)
"""In which the report shows them; endpoints follow."""


class Candidate(Protocol):
    """A model and a way to ask it."""

    @property
    def name(self) -> str:
        """Key in the report."""
        ...

    def spec(self) -> dict[str, Any]:
        """What the worker is told beside the prompts: `model`, or `endpoint`; `retrieve` where it answers with passages."""
        ...

    def prompt(self, messages: Sequence[Message]) -> list[Message]:
        """What the model is asked: `messages` ends with the user's turn."""
        ...


@dataclass(frozen=True)
class Plain:
    """The model as it is served: the conversation, nothing more."""

    name: str
    model: str
    retrieve: bool = False
    """With passages, which the worker finds and puts in."""

    def spec(self) -> dict[str, Any]:
        """The model's folder or Hugging Face id."""
        return {"model": self.model, "retrieve": self.retrieve}

    def prompt(self, messages: Sequence[Message]) -> list[Message]:
        """The messages themselves."""
        return list(messages)


@dataclass(frozen=True)
class Remote:
    """A model behind an OpenAI-compatible address."""

    endpoint: EndpointSettings

    @property
    def name(self) -> str:
        """The endpoint's."""
        return self.endpoint.name

    def spec(self) -> dict[str, Any]:
        """The address; the key stays in its environment variable."""
        return {"endpoint": self.endpoint.model_dump(include={"url", "model", "api_key_env", "timeout"})}

    def prompt(self, messages: Sequence[Message]) -> list[Message]:
        """The messages themselves."""
        return list(messages)


@dataclass(frozen=True)
class FewShot:
    """The model with examples as earlier turns, after the system message. What does not fit into the context loses them first.

    How many of them a model on this machine is shown is chosen by `worker.retrieve`; behind an address, which tells no
    likelihoods, it is shown all.
    """

    name: str
    model: str
    shots: tuple[tuple[str, str], ...]
    """(user turn, reply) of each example."""
    endpoint: EndpointSettings | None = None
    """Where the model answers, if not here."""

    def spec(self) -> dict[str, Any]:
        """The model's folder or Hugging Face id and the examples to choose from, or its address."""
        return {"model": self.model, "shots": self.shots} if self.endpoint is None else Remote(self.endpoint).spec()

    def prompt(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with the examples where they go to an address."""
        return list(messages) if self.endpoint is None else with_shots(messages, self.shots)


def with_shots(messages: Sequence[Message], shots: Sequence[Sequence[str]]) -> list[Message]:
    """System message, examples (user turn, reply), conversation."""
    turns = list(messages)
    system = [turns.pop(0)] if turns and turns[0]["role"] == "system" else []
    shown = [{"role": role, "content": text} for shot in shots for role, text in zip(("user", "assistant"), shot, strict=True)]
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
    tools: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Functions that the reply may call."""
    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """`tool_calls` of the reference, whose text `reference` holds too."""

    @property
    def user_text(self) -> str:
        """The user's last turn."""
        return said(self.messages[-1]) if self.messages else ""

    @property
    def texts(self) -> list[str]:
        """What each message of the prompt says, tool calls and their results included."""
        return [said(message) for message in self.messages]


def test_rows(dataset: Path, most: int) -> list[TestRow]:
    """The test rows with the `most` smallest hashes of their messages, in that order: rows that are added displace few others.

    Raises DataError for a test set without rows.
    """
    rows = split_rows(dataset, "test")
    if not rows:
        raise DataError(
            f"The data set {dataset} has no test rows, so nothing can be measured. "
            "Raise `split.test`, widen `window_weeks`, or add data."
        )
    return by_hash(rows)[:most]


test_rows.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]


def choose_shots(dataset: Path, count: int) -> tuple[tuple[str, str], ...]:
    """Examples for the few-shot prompt, from the train split.

    One for each of the `count` most frequent intents (round again where there are fewer): among its single-turn examples (all
    of them where there is none) whose length is in the shorter half without its shortest half, the one with the smallest hash.
    So: typical, short, and the same in every run. The most frequent intent comes last, nearest to the question.
    """
    by_intent: dict[str, list[TestRow]] = {}
    for row in split_rows(dataset, "train"):
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


def standard(
    dataset: Path,
    base_model: str,
    tuned_model: str,
    settings: Benchmark,
    champion: str | None = None,
) -> list[Candidate]:
    """Base, base with few-shot examples, the tuned model; where there are any, the champion, endpoints, and retrieval.

    A model that a provider serves is asked there; retrieval is measured with models on this machine only.
    """
    shots = choose_shots(dataset, settings.few_shot)
    made: list[Candidate] = [_at(BASE, base_model), FewShot(FEW_SHOT, base_model, shots, address(FEW_SHOT, base_model))]
    if settings.retrieval and address(RAG, base_model) is None:
        made.append(Plain(RAG, base_model, retrieve=True))
    if champion is not None:
        made.append(_at(CHAMPION, champion))
    made.append(_at(TUNED, tuned_model))
    if settings.retrieval and address(TUNED_RAG, tuned_model) is None:
        made.append(Plain(TUNED_RAG, tuned_model, retrieve=True))
    return [*made, *(Remote(endpoint) for endpoint in settings.endpoints)]


def _at(name: str, model: str) -> Candidate:
    endpoint = address(name, model)
    return Plain(name, model) if endpoint is None else Remote(endpoint)


def rented_endpoints(candidates: Sequence[Candidate]) -> list[EndpointSettings]:
    """The addresses and prices of the report's own candidates that a provider serves."""
    found = [one.endpoint for one in candidates if isinstance(one, (Remote, FewShot)) and one.endpoint is not None]
    return [endpoint for endpoint in found if endpoint.name in ORDER]


def _typical(rows: list[TestRow]) -> list[TestRow]:
    alone = [row for row in rows if sum(m["role"] == "user" for m in row.messages) == 1] or rows
    by_length = sorted(alone, key=lambda row: (len(row.user_text) + len(row.reference), _hash(row), row.message_id))
    middle = by_length[len(by_length) // 4 : max(len(by_length) // 2, len(by_length) // 4 + 1)]
    return [*sorted(middle, key=lambda row: (_hash(row), row.message_id)), *(row for row in by_length if row not in middle)]


def by_hash(rows: Sequence[TestRow]) -> list[TestRow]:
    """In the order of a hash of their messages."""
    return sorted(rows, key=lambda row: (_hash(row), row.message_id))


def split_rows(dataset: Path, split: str) -> list[TestRow]:
    """The rows of a split with their lineage, in the file's order. Raises DataError where a line has none."""
    lineage = pl.read_parquet(dataset / "lineage.parquet").filter(pl.col("split") == split)
    where = {row["line"]: row for row in lineage.iter_rows(named=True)}
    rows: list[TestRow] = []
    for line, example in enumerate(read_lines(dataset / f"{split}.jsonl")):
        if line not in where:
            raise DataError(f"{dataset / f'{split}.jsonl'}:{line + 1} has no lineage; build the data set again (`jsonl_splits`).")
        of = where[line]
        *prompt, reply = example["messages"]
        ids = (str(of["conversation_id"]), str(of["message_id"]), str(of["tenant_id"]), str(of["intent"] or "unknown"))
        rows.append(TestRow(prompt, said(reply), *ids, example.get("tools") or [], reply.get("tool_calls") or []))
    return rows


def _hash(row: TestRow) -> str:
    text = "\x1f".join([*(f"{m['role']}\x1e{m['content']}" for m in row.messages), row.reference])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def counts_by_intent(rows: Sequence[TestRow]) -> dict[str, int]:
    """Rows of each intent, most frequent first."""
    return dict(sorted(Counter(row.intent for row in rows).items(), key=lambda item: (-item[1], item[0])))
