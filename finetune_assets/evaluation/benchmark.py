"""From a frozen data set and a tuned model to the content of a report.

    spec = prepare(assistant, dataset, candidates, output)     writes the prompts, gives the worker's spec
    python -m finetune_assets.worker <output>/spec.json        writes one Parquet a candidate, and result.json
    report = summarise(assistant, output, made)                measures, intervals, gates, verdict, samples

Reads files, writes only under `output`. What reports look like is `report`'s concern.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import DataError
from finetune_assets.evaluation import gates as gate_rules
from finetune_assets.evaluation import measures, rules, samples
from finetune_assets.evaluation.candidates import BASE, FEW_SHOT, TUNED, Candidate, FewShot, TestRow, counts_by_intent, test_rows
from finetune_assets.evaluation.measures import Outputs
from finetune_assets.evaluation.statistics import RESAMPLES, Bootstrap, as_dicts
from finetune_assets.evaluation.texts import Texts
from finetune_assets.storage import read_json, write_json, write_text

REPORT_VERSION = 1
CURVE_POINTS = 200


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
    """Command that makes this version and report again."""


def prepare(
    assistant: Assistant,
    dataset: Path,
    candidates: Sequence[Candidate],
    output: Path,
    *,
    threads: int = 0,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Writes `<output>/prompts/<name>.jsonl`, rows.json and spec.json; the spec. `threads`: 0 leaves torch its default.

    Raises DataError for a test set without rows.
    """
    rows = test_rows(dataset, assistant.benchmark.max_rows)
    asked: list[dict[str, Any]] = []
    for candidate in candidates:
        path = output / "prompts" / f"{candidate.name}.jsonl"
        lines = [
            {"messages": candidate.prompt(row.messages), "reference": row.reference, "conversation_id": row.conversation_id}
            for row in rows
        ]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        asked.append({"name": candidate.name, "model": candidate.model, "prompts": str(path)})
    shots = max((len(c.shots) for c in candidates if isinstance(c, FewShot)), default=0)
    total = int(pl.read_parquet(dataset / "lineage.parquet").filter(pl.col("split") == "test").height)
    write_json(output / "rows.json", {"rows": [asdict(row) for row in rows], "shots": shots, "test_rows_in_dataset": total})
    spec = {
        "task": "benchmark",
        "output": str(output),
        "candidates": asked,
        "max_new_tokens": assistant.benchmark.max_new_tokens,
        "threads": threads,
        "seed": 0,
        "similarity_model": assistant.benchmark.similarity_model,
        "cache": str(cache or output.parent / "cache"),
    }
    write_json(output / "spec.json", spec)
    return spec


def summarise(assistant: Assistant, output: Path, made: Made) -> dict[str, Any]:
    """The report's content, as report.json holds it. Raises DataError where the worker's outputs are not whole."""
    known = read_json(output / "rows.json")
    rows = [TestRow(**row) for row in known["rows"]]
    result = read_json(output / "result.json")
    frames = {name: _frame(output / facts["outputs"], len(rows)) for name, facts in result["candidates"].items()}
    references = rules.verdicts(assistant.rules, rows, [row.reference for row in rows])
    kept = {name: rules.verdicts(assistant.rules, rows, frame["reply"].to_list()) for name, frame in frames.items()}
    fitting = rules.fits(references)
    outputs = {
        name: Outputs(frame, result["candidates"][name], rules.sums(kept[name], fitting)) for name, frame in frames.items()
    }
    bootstrap = Bootstrap([row.conversation_id for row in rows])
    estimates = {name: measures.estimates(output) for name, output in outputs.items()}
    rate = assistant.budget.usd_per_hour
    intervals = {name: measures.intervals(outputs[name], estimates[name], bootstrap, rate) for name in outputs}
    differences = {
        f"{TUNED}_vs_{other}": measures.differences(estimates[TUNED], estimates[other], bootstrap)
        for other in (BASE, FEW_SHOT)
        if other in estimates
    }
    texts = Texts(assistant.language)
    evidence = gate_rules.Evidence(
        tuned=intervals[TUNED],
        versus_base=differences.get(f"{TUNED}_vs_{BASE}", {}),
        training_loss=made.training.get("train_loss"),
        rows=len(rows),
        conversations=bootstrap.count,
        rules_set=len(assistant.rules),
        rules_fitting=sum(fitting),
    )
    gates = gate_rules.decide(assistant.gates, evidence, texts)
    manifest = read_json(made.dataset / "manifest.json")
    return {
        "report_version": REPORT_VERSION,
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "assistant": assistant.name,
        "language": assistant.language,
        "model_version": made.model_version,
        "dataset_fingerprint": manifest["fingerprint"],
        "verdict": gate_rules.verdict(gates),
        "reasons": gate_rules.reasons(gates, evidence, texts),
        "test_rows": len(rows),
        "test_rows_in_dataset": known["test_rows_in_dataset"],
        "test_conversations": bootstrap.count,
        "test_intents": counts_by_intent(rows),
        "statistics": {"resamples": RESAMPLES, "unit": "conversation", "level": 0.95, "method": "BCa; Wilson for shares"},
        "candidates": {name: as_dicts(values) for name, values in intervals.items()},
        "differences": {name: as_dicts(values) for name, values in differences.items()},
        "gates": [gate.as_dict() for gate in gates],
        "rules": rules.table(assistant.rules, rows, references, kept),
        "rules_by_intent": rules.by_intent(rows, fitting, references, kept),
        "samples": samples.choose(rows, frames, assistant.rules, fitting, kept),
        "models": {name: _model(name, facts, frames[name], known["shots"]) for name, facts in result["candidates"].items()},
        **_provenance(assistant, made, manifest, result),
    }


def _provenance(assistant: Assistant, made: Made, manifest: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Where the model and the numbers come from: training, plan, data, machine, code."""
    return {
        "training": {"result": dict(made.training), "curve": curve(made.training_log)},
        "plan": dict(made.plan),
        "data": {key: manifest.get(key) for key in ("weeks", "counts", "rejected", "settings", "warnings")},
        "base_model": assistant.base_model,
        "similarity_model": result["similarity_model"],
        "machine": {**result["machine"], "threads": result["threads"], "benchmark_seconds": result["seconds"]},
        "code_version": made.code_version,
        "reproduce": made.reproduce,
    }


def curve(path: Path | None) -> list[dict[str, float]]:
    """Points of the training log with step and loss or eval_loss, thinned to CURVE_POINTS; empty without a log."""
    if path is None or not path.exists():
        return []
    points: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line) if line.strip() else {}
        kept = {k: float(entry[k]) for k in ("step", "loss", "eval_loss") if isinstance(entry.get(k), int | float)}
        if "step" in kept and len(kept) > 1:
            points.append(kept)
    step = -(-len(points) // CURVE_POINTS) or 1
    return [point for n, point in enumerate(points) if n % step == 0 or n == len(points) - 1 or "eval_loss" in point]


def _frame(path: Path, rows: int) -> pl.DataFrame:
    frame = pl.read_parquet(path)
    if frame.height != rows:
        raise DataError(f"{path} has {frame.height} rows, the test set {rows}; run the benchmark again in an empty folder.")
    return frame


def _model(name: str, facts: Mapping[str, Any], frame: pl.DataFrame, shots: int) -> dict[str, Any]:
    return {
        **{key: facts.get(key) for key in ("model", "identity", "context", "max_new_tokens")},
        "shots": shots if name == FEW_SHOT else 0,
        "prompts_cut": round(float((frame["dropped_turns"] > 0).mean() or 0.0), 6),  # pyright: ignore[reportArgumentType]
        "without_likelihood": int(frame["nll"].null_count()),
        "personal_data": dict(sum((measures.personal_data(reply) for reply in frame["reply"]), start=_nothing())),
        "reply_tokens_mean": round(float(np.mean(frame["reply_tokens"].to_numpy())), 2),
    }


def _nothing() -> Any:
    return measures.personal_data("")
