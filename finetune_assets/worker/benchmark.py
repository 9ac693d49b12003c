"""Task `benchmark`: every candidate's reply to every prompt, how likely the references are to it, and how long one reply takes.

    spec: {"task": "benchmark", "output": dir, "candidates": [{"name", "model", "prompts": JSONL of {"messages", "reference",
           "conversation_id", "tenant_id", "tools"?, "calls"?}, "retrieve": bool, "shots"?: [[user, reply]],
           "checks"?: JSONL of {"messages", "tools"?, "tenant_id"}} or {"name", "endpoint": {…}, "prompts", "checks"?}],
           "max_new_tokens": 96, "threads": 2, "seed": 0, "similarity_model": null, "toxicity_model": null, "language": "es",
           "cache": dir, "latency_rows": 24, "passages": JSONL, "validation": JSONL, "general": JSONL, "canaries": […],
           "checks": JSONL of the standing suite's bare cases, which a judge is shown}

Writes `<output>/<name>.parquet` (COLUMNS, one row a prompt). A batch is cached under a hash of the model's weights and
tokenizer, the batch's prompts and the decoding settings: what was killed goes on from there with the same batches, and a second
report of the same models, or of a retrain that gave the same weights, is read from the cache. Waiting times are measured one
reply at a time on the first `latency_rows` prompts, since the time of a batch says nothing about a person's wait; they are of
this machine. The same replies show whether a model says alone, as it is served, what it said in a batch (parity).
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import polars as pl
import torch

from finetune_assets.dataset.formats import read_lines
from finetune_assets.evaluation import judge
from finetune_assets.evaluation.candidates import TestRow
from finetune_assets.storage import read_json, write_parquet
from finetune_assets.worker import endpoint
from finetune_assets.worker.asking import Candidate
from finetune_assets.worker.cached import Cache, ask
from finetune_assets.worker.generate import Generator
from finetune_assets.worker.measuring import Bench, machine
from finetune_assets.worker.progress import Progress

COLUMNS: dict[str, Any] = {
    "row": pl.Int64,
    "reply": pl.String,  # null where an endpoint gave none
    "missing": pl.String,  # why
    "sources": pl.List(pl.String),  # what retrieval found for it
    "nll": pl.Float64,  # nats, sum over the reference and its end token; null where it does not fit into the context
    "reference_tokens": pl.Int64,  # with the end token
    "reference_bytes": pl.Int64,  # UTF-8, without the end token
    "prompt_tokens": pl.Int64,
    "reply_tokens": pl.Int64,  # with the end token
    "stopped": pl.Boolean,
    "dropped_turns": pl.Int64,
    "seconds": pl.Float64,  # one reply alone; null where it was not measured
    "similarity": pl.Float32,  # cosine with the reference; null where the reference is empty
    "toxicity": pl.Float32,  # score of a classifier; null without one
    "floor": pl.Float32,  # cosine with the reference of another conversation
    "bleu": pl.List(pl.Float64),  # sufficient statistics of evaluation/metrics
    "chrf": pl.List(pl.Float64),
    "rouge_l": pl.Float64,
}


def run(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Runs the candidates; what was measured of each, and of the machine."""
    start = time.perf_counter()
    if spec.get("threads"):
        torch.set_num_threads(int(spec["threads"]))
    torch.manual_seed(int(spec.get("seed", 0)))
    output = Path(spec["output"])
    cache = Cache(Path(spec.get("cache") or output.parent / "cache"))
    bench = Bench(spec, cache, progress)
    candidates = [Candidate.of(one) for one in spec["candidates"]]
    by_model: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.model is not None:
            by_model.setdefault(candidate.model, []).append(candidate)
    results: dict[str, dict[str, Any]] = {}
    for model, group in by_model.items():
        generator = Generator(model, int(spec.get("max_new_tokens", 96)))
        for candidate in group:
            results[candidate.name] = bench.local(candidate, generator)
        del generator
        gc.collect()
    for candidate in candidates:
        if candidate.endpoint is not None:
            results[candidate.name] = bench.remote(candidate)
    bench.similarities(candidates, results)
    bench.toxicities(candidates, results)
    bought: list[dict[str, Any]] = []
    judged = _judge(spec, results, cache, progress, bought) if spec.get("judge") else None
    if spec.get("judge") and spec.get("checks"):
        _judge_cases(spec, results, cache, bought)
    summary = {c.name: _write(output, c, results[c.name]) for c in candidates}
    return {
        "candidates": summary,
        "similarity_model": bench.encoder_name,
        "judge": judged,
        "judge_bought": endpoint.bought(bought),
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 3),
        "scoring_cpu_seconds": round(bench.scoring, 3),
        "cached_batches": cache.found,
        "computed_batches": cache.made,
    }


def _judge(
    spec: dict[str, Any], results: dict[str, dict[str, Any]], cache: Cache, progress: Progress, bought: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a judging model says of two candidates' replies; each answer is cached. `bought`: gets the new ones."""
    about = spec["judge"]
    where = endpoint.Endpoint(**about["endpoint"])
    rows = [TestRow(**row) for row in read_json(Path(spec["output"]) / "rows.json")["rows"]]
    asked = judge.questions(rows, results[about["first"]]["reply"], results[about["second"]]["reply"], about["rows"])
    prompts = [question[way] for question in asked for way in ("forth", "back")]
    progress.update("judge", 0, len(prompts))
    told, fresh = ask(cache, where, prompts, judge.ANSWER_TOKENS)
    answers = [answer["reply"] for answer in told]
    bought += fresh
    progress.update("judge", len(prompts), len(prompts))
    found = judge.judged(rows, asked, list(zip(answers[::2], answers[1::2], strict=True)))
    return {**found, "model": where.model, "first": about["first"], "second": about["second"]}


def _judge_cases(spec: dict[str, Any], results: dict[str, dict[str, Any]], cache: Cache, bought: list[dict[str, Any]]) -> None:
    """Adds to the candidates' facts what the judging model says of the cases that ask for it: `checks_judged`, null elsewhere."""
    where = endpoint.Endpoint(**spec["judge"]["endpoint"])
    cases = list(read_lines(Path(spec["checks"])))
    for columns in results.values():
        replies: list[str | None] = columns["_facts"].get("checks") or []
        asked = [n for n, reply in enumerate(replies) if reply is not None and cases[n].get("judge")]
        prompts = [judge.case_question(cases[n]["messages"], replies[n] or "", cases[n]["judge"]) for n in asked]
        answers, fresh = ask(cache, where, prompts, judge.ANSWER_TOKENS)
        bought += fresh
        said = {n: judge.holds(answer["reply"]) for n, answer in zip(asked, answers, strict=True)}
        columns["_facts"]["checks_judged"] = [said.get(n) for n in range(len(replies))]


def _write(output: Path, candidate: Candidate, columns: dict[str, Any]) -> dict[str, Any]:
    """Writes the candidate's Parquet; its facts."""
    facts = columns.pop("_facts")
    columns |= {"row": list(range(len(candidate.rows)))}
    columns["reference_bytes"] = [len(row["reference"].encode()) for row in candidate.rows]
    write_parquet(output / f"{candidate.name}.parquet", pl.DataFrame({n: columns[n] for n in COLUMNS}, schema=COLUMNS))
    return {**facts, "outputs": f"{candidate.name}.parquet", "rows": len(candidate.rows)}
