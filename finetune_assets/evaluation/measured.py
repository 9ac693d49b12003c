"""The worker's outputs, measured: estimates and intervals of every candidate, in the same draws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import DataError
from finetune_assets.evaluation import called, decision, facts, guards, measures, rules
from finetune_assets.evaluation.candidates import BASE, TUNED, TestRow, split_rows
from finetune_assets.evaluation.conduct import Watch
from finetune_assets.evaluation.isolation import Own, foreign, own_facts
from finetune_assets.evaluation.measures import Outputs
from finetune_assets.evaluation.seeds import Training
from finetune_assets.evaluation.statistics import Bootstrap, Estimate, Interval
from finetune_assets.evaluation.suite import Case

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Made:
    """What is known of the model that is measured."""

    model_version: str
    dataset: Path
    """Frozen folder."""
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """result.json of the training: train_loss, eval_loss, steps, tokens, seconds, …"""
    training_log: Path | None = None
    """training_log.jsonl."""
    plan: Mapping[str, Any] = field(default_factory=dict[str, Any])
    code_version: str = ""
    reproduce: str = ""
    """Command that trains this version again."""
    contacts: frozenset[str] = frozenset()
    """Public contacts of the tenants: a reply may name them."""
    champion: str | None = None
    """Version that it is compared with."""
    requests_per_month: int | None = None
    """Traffic that the corpus has seen."""
    trained: Sequence[Training] = ()
    """Further trainings of it, with other seeds."""
    human: Mapping[str, str] = field(default_factory=dict[str, str])
    """Message id -> `first`, `second` or `tie`, as people rated the pairs that a judge is asked about."""


@dataclass(frozen=True)
class Measured:
    """Everything that is known of the candidates' replies to the same rows."""

    frames: dict[str, pl.DataFrame]
    outputs: dict[str, Outputs]
    estimates: dict[str, dict[str, Estimate]]
    intervals: dict[str, dict[str, Interval]]
    bootstrap: Bootstrap
    references: Floats
    """[rows, rules]: verdicts on the references."""
    kept: dict[str, Floats]
    """[rows, rules] of each candidate."""
    fitting: list[bool]
    """Rules that the references keep."""
    reference_judged: list[facts.Judged]
    """What the references state, themselves not counted as support."""

    def difference(self, first: str, second: str) -> dict[str, Interval]:
        """First minus second of every comparable measure, over the rows that both answered."""
        return {name: self.compare(first, second, name) for name in measures.COMPARABLE}

    def compare(self, first: str, second: str, measure: str, here: NDArray[np.bool_] | None = None) -> Interval:
        """First minus second of one measure, on all rows or on those that are `here`."""
        one, other = (self.estimates[name][measure] for name in (first, second))
        there = self.outputs[first].there & self.outputs[second].there
        there = there if here is None else there & here
        found = measures.one_difference(one, other, self.bootstrap, there)
        return replace(found, low=0.0, high=0.0) if found.value == 0 and self._same(first, second, there) else found

    def within(self, name: str, measure: str, here: NDArray[np.bool_]) -> Interval:
        """One measure of a candidate on some of the rows."""
        return self.bootstrap.interval(measures.only(self.estimates[name][measure], self.outputs[name].there & here))

    def _same(self, first: str, second: str, there: NDArray[np.bool_]) -> bool:
        """Whether both are one model that said the same: then they differ by nothing, where rows that agree would only suggest
        it."""
        one, other = (self.outputs[name].facts.get("identity") for name in (first, second))
        replies = (self.frames[name]["reply"].to_numpy()[there].tolist() for name in (first, second))
        return one is not None and one == other and next(replies) == next(replies)

    def facts_table(self) -> dict[str, Any]:
        """How many rows are judged for their facts, and how many references go beyond the conversation."""
        judged = self.reference_judged
        return {
            "rows": len(judged),
            "stating": sum(bool(one.stated) for one in judged),
            "need_knowledge": sum(bool(one.stated) and not one.answerable for one in judged),
        }


@dataclass(frozen=True)
class _Bar:
    """What the replies to the test rows are held to."""

    assistant: Assistant
    rows: Sequence[TestRow]
    passages: Mapping[str, str]
    """Source -> what was shown of it."""
    own: Own
    watch: Watch
    contacts: frozenset[str]

    @classmethod
    def of(cls, assistant: Assistant, output: Path, rows: Sequence[TestRow], made: Made) -> _Bar:
        own = own_facts((row.tenant_id, row.texts, row.reference) for row in split_rows(made.dataset, "train"))
        watch = Watch.of(assistant.benchmark.conduct, assistant.language)
        return cls(assistant, rows, _passages(output / "passages.jsonl"), own, watch, made.contacts)

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(self.assistant.benchmark.terms)

    def outputs(self, name: str, frame: pl.DataFrame, told: Mapping[str, Any], rule_sums: Floats) -> Outputs:
        """A candidate's replies, judged."""
        replies, sources = _replies(frame), frame["sources"].to_list()
        said = [
            row.texts + [self.passages.get(source, "") for source in found or []]
            for row, found in zip(self.rows, sources, strict=True)
        ]
        each = list(zip(replies, self.rows, said, strict=True))
        return Outputs(
            frame,
            dict(told),
            rule_sums,
            [facts.judge(reply, row.reference, context, self.terms) for reply, row, context in each],
            [self._foreign(*one) for one in each],
            called=[
                called.exact(reply, row.reference) if row.reference.strip() else None
                for reply, row in zip(replies, self.rows, strict=True)
            ],
            toxic=[self.watch.toxic(*one) for one in zip(replies, frame["toxicity"].to_list(), strict=True)],
            refused=[self.watch.refused(reply) for reply in replies],
            accurate_similarity=self.assistant.benchmark.accurate_similarity,
            usd_per_request=self._price(name, frame),
            contacts=self.contacts,
        )

    def _foreign(self, reply: str, row: TestRow, context: list[str]) -> bool | None:
        return bool(foreign(reply, row.tenant_id, [*context, row.reference], self.own)) if self.own else None

    def _price(self, name: str, frame: pl.DataFrame) -> float | None:
        """Of an endpoint's mean request."""
        endpoint = next((one for one in self.assistant.benchmark.endpoints if one.name == name), None)
        tokens = _mean(frame["prompt_tokens"]), _mean(frame["reply_tokens"])
        return None if endpoint is None else decision.usd_per_request(endpoint, *tokens)

    def references(self) -> list[facts.Judged]:
        """What the references state, themselves not counted as support."""
        alone = [facts.judge(row.reference, "", row.texts, self.terms) for row in self.rows]
        answerable = [facts.judge("", row.reference, row.texts, self.terms) for row in self.rows]
        return [
            facts.Judged(mine.stated, mine.unsupported, other.answerable, other.expected, other.expected)
            for mine, other in zip(alone, answerable, strict=True)
        ]


def measure(
    assistant: Assistant, output: Path, rows: Sequence[TestRow], result: Mapping[str, Any], made: Made, cases: Sequence[Case]
) -> Measured:
    """Reads `<output>/<name>.parquet`. Raises DataError where one is not whole."""
    told: Mapping[str, Any] = result["candidates"]
    frames = {name: _frame(output / about["outputs"], len(rows)) for name, about in told.items()}
    references = rules.verdicts(assistant.rules, rows, [row.reference if row.reference.strip() else None for row in rows])
    fitting = rules.fits(references)
    kept = {name: rules.verdicts(assistant.rules, rows, frame["reply"].to_list()) for name, frame in frames.items()}
    bar = _Bar.of(assistant, output, rows, made)
    outputs = {name: bar.outputs(name, frame, told[name], rules.sums(kept[name], fitting)) for name, frame in frames.items()}
    bootstrap = Bootstrap([row.conversation_id for row in rows])
    estimates = {name: measures.estimates(one) for name, one in outputs.items()}
    rate = assistant.budget.usd_per_hour
    guarded = {name: guards.guards(told[name], told.get(BASE) if name != BASE else None, cases) for name in outputs}
    intervals = {name: measures.intervals(one, estimates[name], bootstrap, rate, guarded[name]) for name, one in outputs.items()}
    if TUNED in intervals:
        intervals[TUNED]["overfitting"] = guards.overfitting(intervals[TUNED]["loss"], made.training)
    return Measured(frames, outputs, estimates, intervals, bootstrap, references, kept, fitting, bar.references())


def _replies(frame: pl.DataFrame) -> list[str]:
    return [reply or "" for reply in frame["reply"].to_list()]


def _mean(column: pl.Series) -> float | None:
    value = column.mean()
    return float(value) if isinstance(value, int | float) else None


def _passages(path: Path) -> dict[str, str]:
    """Source -> what was shown of it; empty where nobody retrieved."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["source"]: f"{line['question']}\n{line['text']}" for line in lines}


def _frame(path: Path, rows: int) -> pl.DataFrame:
    frame = pl.read_parquet(path)
    if frame.height != rows:
        raise DataError(f"{path} has {frame.height} rows, the test set {rows}; run the benchmark again in an empty folder.")
    return frame
