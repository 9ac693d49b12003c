"""A report's parts: generation beside a plain loop, and what scoring takes of the whole.

    python -m benchmarks.evaluation [--rows 96]

Prints one JSON object; CPU seconds of this process. `rows(rounds)` is not needed for it to run alone.
"""

# ruff: noqa: T201, PLC0415
from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


def measure(count: int) -> dict[str, Any]:
    """A whole benchmark of the base model on the sample: seconds, share of scoring, and generation beside a plain loop."""
    import torch

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

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        store, folder = Store(Path(home)), Path(home)
        tables = read_source([str(ROOT / "data" / "sample")])
        weeks = stale_weeks(store, tables).stale
        ingest_conversations(store, tables, weeks, b"key")
        ingest_feedback(store, tables, weeks, b"key")
        build_examples(store, weeks)
        made = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
        assistant = made.model_copy(update={"benchmark": made.benchmark.model_copy(update={"max_rows": count})})
        freeze(store, assistant, choose(store, assistant))
        dataset = (store.datasets("dental") / "latest").resolve()
        base = str(ROOT / "data" / "base_model")
        rows = candidates.test_rows(dataset, count)
        generator = Generator(base, assistant.benchmark.max_new_tokens)
        prompts = [models.encode_prompt(generator.tokenizer, row.messages, generator.prompt_length)[0] for row in rows]
        generator.replies(prompts[:1])

        start = time.process_time()
        tokens = sum(
            r.tokens for batch in batches([len(p) for p in prompts]) for r in generator.replies([prompts[n] for n in batch])
        )
        ours = time.process_time() - start
        start = time.process_time()
        plain = 0
        for prompt in prompts:
            mask = torch.ones(1, len(prompt), dtype=torch.long)
            plain += generator.model.generate(input_ids=torch.tensor([prompt]), attention_mask=mask).shape[1] - len(prompt)
        theirs = time.process_time() - start

        started = time.process_time()
        asked = candidates.standard(dataset, base, base, assistant.benchmark)
        spec = benchmark.prepare(assistant, dataset, asked, folder / "out", threads=1)
        result = worker.run(spec, Progress.open(folder / "out"))
        write_json(folder / "out" / "result.json", result)
        worked = time.process_time() - started
        started = time.process_time()
        report = benchmark.summarise(assistant, folder / "out", benchmark.Made("v1", dataset))
        summarised = time.process_time() - started
        again = worker.run({**spec, "output": str(folder / "again")}, Progress.open(folder / "again"))
    return {
        "rows": len(rows),
        "tokens": tokens,
        "generation_tokens_per_cpu_second": round(tokens / ours, 1),
        "plain_loop_tokens_per_cpu_second": round(plain / theirs, 1),
        "ratio": round((tokens / ours) / (plain / theirs), 2),
        "report_cpu_seconds": round(worked + summarised, 1),
        "scoring_share": round((result["scoring_seconds"] + summarised) / (worked + summarised), 4),
        "second_report_computed": again["computed_batches"],
        "candidates": list(report["candidates"]),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=96)
    print(json.dumps(measure(parser.parse_args().rows), indent=2))


if __name__ == "__main__":
    main()
