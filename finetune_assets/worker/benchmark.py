"""Task `benchmark`: every candidate's reply to every prompt, how likely the references are to it, and how long one reply takes.

    spec: {"task": "benchmark", "output": dir, "candidates": [{"name", "model", "prompts": JSONL of {"messages", "reference",
           "conversation_id"}}], "max_new_tokens": 96, "threads": 2, "seed": 0, "similarity_model": null, "cache": dir,
                       "latency_rows": 24}

Writes `<output>/<name>.parquet` (COLUMNS, one row a prompt). A batch is cached under a hash of the model's content, the batch's
prompts and the decoding settings: what was killed goes on from there with the same batches, and a second report of the same
models is read from the cache. Waiting times are measured one reply at a time on the first `latency_rows` prompts, since the
time of a batch says nothing about a person's wait; they are of this machine.
"""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import torch
import transformers

from finetune_assets.dataset.formats import read_lines
from finetune_assets.evaluation.metrics import bleu, chrf, rouge_l
from finetune_assets.storage import read_json, write_json, write_parquet
from finetune_assets.training import base_model as base_models
from finetune_assets.worker import embed, models
from finetune_assets.worker.generate import Generator, batches, finite, logit_tokens
from finetune_assets.worker.progress import Progress

VERSION = 1  # of the cache: raise it when decoding or likelihood changes
COLUMNS: dict[str, Any] = {
    "row": pl.Int64,
    "reply": pl.String,
    "nll": pl.Float64,  # nats, sum over the reference and its end token; null where it does not fit into the context
    "reference_tokens": pl.Int64,  # with the end token
    "reference_bytes": pl.Int64,  # UTF-8, without the end token
    "prompt_tokens": pl.Int64,
    "reply_tokens": pl.Int64,  # with the end token
    "stopped": pl.Boolean,
    "dropped_turns": pl.Int64,
    "seconds": pl.Float64,  # one reply alone; null where it was not measured
    "similarity": pl.Float32,  # cosine with the reference; null where the reference is empty
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
    candidates = [Candidate(one["name"], one["model"], list(read_lines(Path(one["prompts"])))) for one in spec["candidates"]]
    by_model: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_model.setdefault(candidate.model, []).append(candidate)
    results: dict[str, dict[str, Any]] = {}
    for model, group in by_model.items():
        generator = Generator(model, int(spec.get("max_new_tokens", 96)))
        for candidate in group:
            results[candidate.name] = _candidate(candidate, generator, cache, int(spec.get("latency_rows", 24)), progress)
        del generator
        gc.collect()
    similarity_model = _similarities(candidates, results, spec, cache, progress)
    summary = {c.name: _write(output, c, results[c.name]) for c in candidates}
    return {
        "candidates": summary,
        "similarity_model": similarity_model,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 3),
        "cached_batches": cache.found,
        "computed_batches": cache.made,
    }


@dataclass(frozen=True)
class Candidate:
    """A model and what it is asked."""

    name: str
    model: str
    rows: list[dict[str, Any]]


class Stage:
    """Counts the rows that are done."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self.progress, self.name, self.total, self.count = progress, name, total, 0

    def done(self, rows: int) -> None:
        """`rows` more."""
        self.count += rows
        self.progress.update(self.name, self.count, self.total)


class Cache:
    """JSON values under a hash of what made them: `<folder>/ab/abcdef….json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = self.made = 0

    def get(self, make: Callable[[], Any], *what: Any) -> Any:
        """The value of `what` (anything JSON can write), made where it is not there."""
        key = digest([VERSION, *what])
        path = self.folder / key[:2] / f"{key}.json"
        if path.exists():
            self.found += 1
            return read_json(path)
        self.made += 1
        value = make()
        write_json(path, value)
        return value


def _candidate(candidate: Candidate, generator: Generator, cache: Cache, latency_rows: int, progress: Progress) -> dict[str, Any]:
    """Columns of a candidate as lists, and `_facts` about its model."""
    started = time.perf_counter()
    about = [base_models.identity(candidate.model), generator.max_new_tokens, transformers.__version__, torch.__version__]
    prompts, columns = _prompts(candidate, generator)
    replies: list[Any] = [None] * len(prompts)

    def answer(batch: list[int]) -> Any:
        inputs = [prompts[row] for row in batch]
        return cache.get(lambda: [vars(reply) for reply in generator.replies(inputs)], "replies", about, inputs)

    stage = Stage(progress, f"{candidate.name} replies", len(prompts))
    for batch, made in _each(generator, batches([len(p) for p in prompts]), answer, stage):
        for row, reply in zip(batch, made, strict=True):
            replies[row] = reply
    columns |= {"reply": [r["text"] for r in replies], "reply_tokens": [r["tokens"] for r in replies]}
    columns["stopped"] = [r["stopped"] for r in replies]
    columns |= _likelihoods(candidate, generator, cache, about, progress)
    measured = prompts[:latency_rows]
    where = [machine(), torch.get_num_threads()]
    progress.update(f"{candidate.name} waiting time", 0, len(measured))
    seconds = cache.get(lambda: _seconds(generator, measured), "seconds", about, measured, where)
    columns["seconds"] = seconds + [None] * (len(prompts) - len(seconds))
    progress.update(f"{candidate.name} waiting time", len(measured), len(measured))
    facts = cache.get(lambda: _facts(generator), "facts", about)
    facts |= {"context": generator.context, "max_new_tokens": generator.max_new_tokens, "model": candidate.model}
    return {**columns, "_facts": {**facts, "identity": about[0], "seconds": round(time.perf_counter() - started, 3)}}


def _prompts(candidate: Candidate, generator: Generator) -> tuple[list[list[int]], dict[str, Any]]:
    """Prompt ids of each row, and their columns."""
    made = [models.encode_prompt(generator.tokenizer, row["messages"], generator.prompt_length) for row in candidate.rows]
    return [ids for ids, _ in made], {"prompt_tokens": [len(ids) for ids, _ in made], "dropped_turns": [d for _, d in made]}


def _likelihoods(
    candidate: Candidate, generator: Generator, cache: Cache, about: list[Any], progress: Progress
) -> dict[str, list[Any]]:
    """Column `nll`, and `reference_tokens`."""
    examples: list[tuple[list[int], list[int]]] = []
    for row in candidate.rows:
        chat = [*row["messages"], {"role": "assistant", "content": row["reference"]}]
        ids, mask, _dropped = models.encode_example(generator.tokenizer, chat, generator.context)
        examples.append((ids, mask))
    nll: list[float | None] = [None] * len(examples)
    fitting = [n for n, (ids, _mask) in enumerate(examples) if len(ids) <= generator.context]
    groups = batches([len(examples[n][0]) for n in fitting], tokens=logit_tokens(generator.vocabulary))

    def measure(batch: list[int]) -> Any:
        inputs = [examples[fitting[n]] for n in batch]
        return cache.get(lambda: [finite(nats) for nats in generator.likelihoods(inputs)], "nll", about, inputs)

    for batch, made in _each(generator, groups, measure, Stage(progress, f"{candidate.name} likelihood", len(fitting))):
        for n, nats in zip(batch, made, strict=True):
            nll[fitting[n]] = nats
    return {"nll": nll, "reference_tokens": [sum(mask) for _, mask in examples]}


def _each(generator: Generator, groups: list[list[int]], work: Callable[[list[int]], Any], stage: Stage) -> Iterator[Any]:
    """(batch, what `work` made of it) in order. Batches of a small model run side by side, one thread each."""
    threads = torch.get_num_threads()
    side_by_side = threads > 1 and len(groups) > 1 and generator.small
    stage.done(0)
    try:
        torch.set_num_threads(1 if side_by_side else threads)
        with ThreadPoolExecutor(threads if side_by_side else 1) as pool:
            for batch, made in zip(groups, pool.map(work, groups), strict=True):
                yield batch, made
                stage.done(len(batch))
    finally:
        torch.set_num_threads(threads)


def _seconds(generator: Generator, prompts: list[list[int]]) -> list[float]:
    """Seconds of each prompt's reply alone, after one that warms up; a small model uses one thread."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if generator.small else threads)
        for prompt in prompts[:1]:
            generator.seconds(prompt)
        return [generator.seconds(prompt) for prompt in prompts]
    finally:
        torch.set_num_threads(threads)


def _facts(generator: Generator) -> dict[str, Any]:
    numbers = list(generator.model.parameters())
    folder = base_models.folder(generator.source)
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder else []
    size = sum(file.stat().st_size for file in files) or sum(p.numel() * p.element_size() for p in numbers)
    return {"parameters": generator.parameters(), "bytes": size}


def _similarities(
    candidates: list[Candidate], results: dict[str, dict[str, Any]], spec: dict[str, Any], cache: Cache, progress: Progress
) -> str:
    """Adds similarity, floor and text statistics to every candidate's columns; the name of the encoder."""
    model = spec.get("similarity_model")
    name = model or embed.DEFAULT
    encoder: list[embed.Encoder] = []

    def measure(replies: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
        if not encoder:
            encoder.append(embed.Encoder(model))
        references = [row["reference"] for row in rows]
        groups = [str(row.get("conversation_id") or n) for n, row in enumerate(rows)]
        vectors = encoder[0].encode([*references, *replies])
        partner = embed.derangement(groups, int(spec.get("seed", 0)))
        own, floor = embed.similarities(vectors[len(rows) :], vectors[: len(rows)], partner)
        empty = np.array([not reference.strip() for reference in references], bool)
        empty_partner = (partner >= 0) & empty[partner]
        return {
            "similarity": _null(own, empty),
            "floor": _null(floor, np.isnan(floor) | empty_partner),
            **texts(replies, references),
        }

    for step, candidate in enumerate(candidates):
        progress.update("similarity", step, len(candidates))
        columns = results[candidate.name]
        asked = [[row["reference"], row.get("conversation_id")] for row in candidate.rows]
        replies: list[str] = columns["reply"]
        columns |= cache.get(
            lambda c=candidate, r=replies: measure(r, c.rows), "texts", name, spec.get("seed", 0), replies, asked
        )
    progress.update("similarity", len(candidates), len(candidates))
    return name


def texts(replies: list[str], references: list[str]) -> dict[str, Any]:
    """Sufficient statistics of BLEU and chrF, and ROUGE-L, of each row, by the local `evaluate.Metric` modules."""
    made: dict[str, Any] = {}
    with TemporaryDirectory() as folder:  # evaluate makes a folder, and writes nothing in it
        for name, metric in (("bleu", bleu.Bleu), ("chrf", chrf.ChrF), ("rouge_l", rouge_l.RougeL)):
            scorer: Any = metric(keep_in_memory=True, cache_dir=folder)
            made[name] = scorer.compute(predictions=replies, references=references)["statistics"]
    made["rouge_l"] = [row[0] for row in made["rouge_l"]]
    return made


def _null(values: Any, where: Any) -> list[float | None]:
    return [None if gone else round(float(value), 6) for value, gone in zip(values, where, strict=True)]


def _write(output: Path, candidate: Candidate, columns: dict[str, Any]) -> dict[str, Any]:
    """Writes the candidate's Parquet; its facts."""
    facts = columns.pop("_facts")
    columns |= {"row": list(range(len(candidate.rows)))}
    columns["reference_bytes"] = [len(row["reference"].encode()) for row in candidate.rows]
    write_parquet(output / f"{candidate.name}.parquet", pl.DataFrame({n: columns[n] for n in COLUMNS}, schema=COLUMNS))
    return {**facts, "outputs": f"{candidate.name}.parquet", "rows": len(candidate.rows)}


def machine() -> dict[str, Any]:
    """What the times depend on."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": names[0] if names else platform.processor(), "cores": len(names) or None, "gpu": gpu}


def digest(value: Any) -> str:
    """Hash of a JSON value."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
