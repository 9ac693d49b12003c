"""A report on the sample: generation beside a plain loop, what scoring takes of the whole, and a second report from the cache."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import ROOT, SAMPLE, Row, cpu, peak_mb
from finetune_assets.assistants import load_assistant
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import read_source
from finetune_assets.dataset import choose, freeze
from finetune_assets.evaluation import benchmark, candidates
from finetune_assets.storage import Store, write_json
from finetune_assets.worker import benchmark as worker
from finetune_assets.worker import models
from finetune_assets.worker.generate import Generator, batches
from finetune_assets.worker.progress import Progress

ROWS = 96


def rows(rounds: int) -> list[Row]:
    """The dental assistant's test prompts and the base model, on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        folder, dataset = Path(home), _dataset(Path(home))
        made = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
        assistant = made.model_copy(update={"benchmark": made.benchmark.model_copy(update={"max_rows": ROWS})})
        base = str(ROOT / "data" / "base_model")
        generator = Generator(base, assistant.benchmark.max_new_tokens)
        asked = [row.messages for row in candidates.test_rows(dataset, ROWS)]
        prompts = [models.encode_prompt(generator.tokenizer, messages, generator.prompt_length)[0] for messages in asked]
        generator.replies(prompts[:1])

        def ours() -> None:
            for batch in batches([len(prompt) for prompt in prompts]):
                generator.replies([prompts[n] for n in batch])

        def theirs() -> None:
            for prompt in prompts:
                mask = torch.ones(1, len(prompt), dtype=torch.long)
                generator.model.generate(input_ids=torch.tensor([prompt]), attention_mask=mask)

        mine, peer = cpu(ours, rounds), cpu(theirs, 1)
        start = time.process_time()
        spec = benchmark.prepare(
            assistant, dataset, candidates.standard(dataset, base, base, assistant.benchmark), folder / "out", threads=1
        )
        result = worker.run(spec, Progress.open(folder / "out"))
        write_json(folder / "out" / "result.json", result)
        worked = time.process_time() - start
        start = time.process_time()
        benchmark.summarise(assistant, folder / "out", benchmark.Made("v1", dataset))
        told = time.process_time() - start
        start = time.process_time()
        again = worker.run({**spec, "output": str(folder / "again")}, Progress.open(folder / "again"))
        second = time.process_time() - start
    share = (result["scoring_seconds"] + told) / (worked + told)
    return [
        Row(
            f"report: replies to {len(prompts)} test prompts, 3M model",
            mine,
            "model.generate, one at a time",
            peer,
            bar="≥ 3 times",
            met=peer / mine >= 3,
            note="one thread",
        ),
        Row(
            f"report: {len(prompts)} rows, five candidates, whole",
            worked + told,
            peak_mb=peak_mb(),
            bar="scoring ≤ 5 %",
            met=share <= 0.05,
            note=f"scoring and statistics {share:.1%}",
        ),
        Row(
            "report: the same again from the cache",
            second,
            bar="nothing computed",
            met=again["computed_batches"] == 0,
            note=f"{again['computed_batches']} batches computed",
        ),
    ]


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
