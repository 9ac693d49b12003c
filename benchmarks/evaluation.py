"""A report on the sample: generation beside a plain loop, what scoring takes of the whole, 500 rows on two cores, and a second
report from the cache."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import polars as pl
import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import ROOT, SAMPLE, Row, cpu, peak_mb
from finetune_assets.assistants import load_assistant
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import read_source
from finetune_assets.dataset import choose, freeze
from finetune_assets.evaluation import benchmark, candidates, report
from finetune_assets.storage import Store, write_json
from finetune_assets.worker import benchmark as worker
from finetune_assets.worker import models
from finetune_assets.worker.generate import Generator, batches
from finetune_assets.worker.progress import Progress

ROWS = 500
PROMPTS = 96
SECONDS = 120


def rows(rounds: int) -> list[Row]:
    """The dental assistant, the base model, and one of the same size with other weights in the tuned model's place."""
    with tempfile.TemporaryDirectory() as home:
        folder, dataset = Path(home), _longer(_dataset(Path(home)), Path(home) / "longer", ROWS)
        made = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
        assistant = made.model_copy(update={"benchmark": made.benchmark.model_copy(update={"max_rows": ROWS})})
        base = str(ROOT / "data" / "base_model")
        beside = _generation(candidates.test_rows(dataset, PROMPTS), base, assistant.benchmark.max_new_tokens, rounds)
        asked = candidates.standard(dataset, base, _other(base, folder / "other"), assistant.benchmark)
        started, start = time.perf_counter(), time.process_time()
        spec = benchmark.prepare(assistant, dataset, asked, folder / "out", threads=2)
        result = worker.run(spec, Progress.open(folder / "out"))
        write_json(folder / "out" / "result.json", result)
        worked, start = time.process_time() - start, time.process_time()
        report.write_report(benchmark.summarise(assistant, folder / "out", benchmark.Made("v1", dataset)), folder / "report")
        told, wall = time.process_time() - start, time.perf_counter() - started
        start = time.process_time()
        again = worker.run({**spec, "output": str(folder / "again")}, Progress.open(folder / "again"))
        second = time.process_time() - start
    share = (result["scoring_cpu_seconds"] + told) / (worked + told)
    return [
        beside,
        Row(
            f"report: {ROWS} rows, {len(asked)} candidates, whole, 3M model",
            worked + told,
            peak_mb=peak_mb(),
            bar=f"< {SECONDS} s on 2 cores",
            met=wall < SECONDS,
            note=f"two threads; {wall:.0f} s by the clock, at a load of {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores",
        ),
        Row(
            f"report: scoring, statistics and pages of {ROWS} rows",
            share * (worked + told),
            bar="≤ 5 % of the report",
            met=share <= 0.05,
            note=f"{share:.1%} of its CPU time",
        ),
        Row(
            "report: the same again from the cache",
            second,
            bar="nothing computed",
            met=again["computed_batches"] == 0,
            note=f"{again['computed_batches']} batches computed",
        ),
    ]


def _generation(test: list[candidates.TestRow], model: str, most: int, rounds: int) -> Row:
    """Replies to the prompts, batched, beside one `generate` a prompt; one thread."""
    torch.set_num_threads(1)
    generator = Generator(model, most)
    prompts = [models.encode_prompt(generator.tokenizer, row.messages, generator.prompt_length)[0] for row in test]
    generator.replies(prompts[:1])
    tokens = 0

    def ours() -> None:
        nonlocal tokens
        made = [generator.replies([prompts[n] for n in batch]) for batch in batches([len(prompt) for prompt in prompts])]
        tokens = sum(reply.tokens for replies in made for reply in replies)

    def theirs() -> None:
        for prompt in prompts:
            mask = torch.ones(1, len(prompt), dtype=torch.long)
            generator.model.generate(input_ids=torch.tensor([prompt]), attention_mask=mask)

    mine, peer = cpu(ours, rounds), cpu(theirs, rounds)
    return Row(
        f"report: replies to {len(prompts)} test prompts, 3M model",
        mine,
        "model.generate, one at a time",
        peer,
        bar="≥ 3 times",
        met=peer / mine >= 3,
        note=f"{tokens / mine:,.0f} and {tokens / peer:,.0f} tokens a CPU second; one thread",
    )


def _other(base: str, folder: Path) -> str:
    """The base with a little noise: other weights, so that nothing of it is found in the cache; replies of like length."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    save_file(
        {name: w + 1e-3 * torch.randn_like(w) if w.is_floating_point() else w for name, w in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return str(folder)


def _longer(dataset: Path, folder: Path, count: int) -> Path:
    """The data set with `count` test rows: rows of training make up for what is wanting."""
    shutil.copytree(dataset, folder)
    lineage = pl.read_parquet(dataset / "lineage.parquet")
    lines = {split: (dataset / f"{split}.jsonl").read_text(encoding="utf-8").splitlines() for split in ("test", "train")}
    moved = count - len(lines["test"])
    (folder / "test.jsonl").write_text("\n".join([*lines["test"], *lines["train"][:moved]]) + "\n", encoding="utf-8")
    (folder / "train.jsonl").write_text("\n".join(lines["train"][moved:]) + "\n", encoding="utf-8")
    train, first = pl.col("split") == "train", pl.col("line") < moved
    changed = lineage.with_columns(
        line=pl.when(train & first)
        .then(pl.col("line") + len(lines["test"]))
        .when(train)
        .then(pl.col("line") - moved)
        .otherwise(pl.col("line")),
        split=pl.when(train & first).then(pl.lit("test")).otherwise(pl.col("split")),
    )
    changed.write_parquet(folder / "lineage.parquet")
    return folder


def _dataset(home: Path) -> Path:
    """The sample, frozen."""
    store = Store(home)
    tables = read_source([str(SAMPLE)])
    weeks = stale_weeks(store, tables).stale
    ingest_conversations(store, tables, weeks, b"key")
    ingest_feedback(store, tables, weeks, b"key")
    build_examples(store, weeks)
    assistant = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
    freeze(store, assistant, choose(store, assistant))
    return (store.datasets("dental") / "latest").resolve()
