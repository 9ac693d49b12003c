"""The worker's outputs, measured: estimates and intervals of every candidate, in the same draws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from finetune_assets.evaluation.isolation import foreign, own_facts
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
        return measures.differences(self.estimates[first], self.estimates[second], self.bootstrap, self._both(first, second))

    def compare(self, first: str, second: str, measure: str, here: NDArray[np.bool_] | None = None) -> Interval:
        """First minus second of one measure, on all rows or on those that are `here`."""
        one, other = (self.estimates[name][measure] for name in (first, second))
        there = self._both(first, second)
        return measures.one_difference(one, other, self.bootstrap, there if here is None else there & here)

    def within(self, name: str, measure: str, here: NDArray[np.bool_]) -> Interval:
        """One measure of a candidate on some of the rows."""
        return self.bootstrap.interval(measures.only(self.estimates[name][measure], self.outputs[name].there & here))

    def _both(self, first: str, second: str) -> NDArray[np.bool_]:
        return self.outputs[first].there & self.outputs[second].there

    def facts_table(self) -> dict[str, Any]:
        """How many rows are judged for their facts, and how many references go beyond the conversation."""
        judged = self.reference_judged
        return {
            "rows": len(judged),
            "stating": sum(bool(one.stated) for one in judged),
            "need_knowledge": sum(not one.answerable for one in judged),
        }


def measure(
    assistant: Assistant, output: Path, rows: Sequence[TestRow], result: Mapping[str, Any], made: Made, cases: Sequence[Case]
) -> Measured:
    """Reads `<output>/<name>.parquet`. Raises DataError where one is not whole."""
    told: Mapping[str, Any] = result["candidates"]
    frames = {name: _frame(output / about["outputs"], len(rows)) for name, about in told.items()}
    references = rules.verdicts(assistant.rules, rows, [row.reference for row in rows])
    fitting = rules.fits(references)
    kept = {name: rules.verdicts(assistant.rules, rows, _replies(frame)) for name, frame in frames.items()}
    found = _passages(output / "passages.jsonl")
    own = own_facts((r.tenant_id, r.texts, r.reference) for r in split_rows(made.dataset, "train"))
    bench = assistant.benchmark
    terms, watch = tuple(bench.terms), Watch.of(bench.conduct, assistant.language)
    prices = {endpoint.name: endpoint for endpoint in bench.endpoints}

    def outputs_of(name: str) -> Outputs:
        frame = frames[name]
        said = [
            row.texts + [found.get(source, "") for source in sources or []]
            for row, sources in zip(rows, frame["sources"].to_list(), strict=True)
        ]
        each = list(zip(_replies(frame), rows, said, strict=True))
        judged = [facts.judge(reply, row.reference, context, terms) for reply, row, context in each]
        alien = [
            bool(foreign(reply, row.tenant_id, [*context, row.reference], own)) if own else None for reply, row, context in each
        ]
        usd = None
        if name in prices:
            tokens = (_mean(frame["prompt_tokens"]), _mean(frame["reply_tokens"]))
            usd = decision.usd_per_request(prices[name], *tokens)
        replies, scores = _replies(frame), frame["toxicity"].to_list()
        return Outputs(
            frame,
            told[name],
            rules.sums(kept[name], fitting),
            judged,
            alien,
            called=[called.exact(reply, row.reference) for reply, row in zip(replies, rows, strict=True)],
            toxic=[watch.toxic(reply, score) for reply, score in zip(replies, scores, strict=True)],
            refused=[watch.refused(reply) for reply in replies],
            accurate_similarity=bench.accurate_similarity,
            usd_per_request=usd,
            contacts=made.contacts,
        )

    outputs = {name: outputs_of(name) for name in frames}
    bootstrap = Bootstrap([row.conversation_id for row in rows])
    estimates = {name: measures.estimates(one) for name, one in outputs.items()}
    base = told.get(BASE)
    rate = assistant.budget.usd_per_hour
    intervals = {
        name: measures.intervals(
            one, estimates[name], bootstrap, rate, guards.guards(told[name], base if name != BASE else None, cases)
        )
        for name, one in outputs.items()
    }
    if TUNED in intervals:
        intervals[TUNED]["overfitting"] = guards.overfitting(intervals[TUNED]["loss"], made.training)
    alone = [facts.judge(row.reference, "", row.texts, terms) for row in rows]
    answerable = [facts.judge("", row.reference, row.texts, terms) for row in rows]
    judged = [
        facts.Judged(mine.stated, mine.unsupported, other.answerable, other.expected, other.expected)
        for mine, other in zip(alone, answerable, strict=True)
    ]
    return Measured(frames, outputs, estimates, intervals, bootstrap, references, kept, fitting, judged)


def _replies(frame: pl.DataFrame) -> list[str]:
    return [reply or "" for reply in frame["reply"].to_list()]


def _mean(column: pl.Series) -> float:
    value = column.mean()
    return float(value) if isinstance(value, int | float) else 0.0


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
