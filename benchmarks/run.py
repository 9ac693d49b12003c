"""`make bench`: our parts beside a named peer on the same work, in the same run, one process after the other.

    python benchmarks/run.py [--rounds 3]

Prints a table of medians and ratios; writes `benchmarks/results.json` with versions, machine and command. Each figure is the
median of `--rounds` repetitions in CPU seconds of this process (all threads), so that other processes disturb it little.
"""

# ruff: noqa: T201, PLC0415
from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"


def cpu(work: Callable[[], Any], rounds: int) -> float:
    """Median CPU seconds of some work."""
    taken: list[float] = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def row(what: str, peer: str, ours: float, theirs: float, note: str) -> dict[str, Any]:
    """One line of the table; the ratio says how many times less CPU time ours takes."""
    return {
        "what": what,
        "peer": peer,
        "cpu_seconds": round(ours, 4),
        "peer_cpu_seconds": round(theirs, 4),
        "ratio": round(theirs / ours, 2),
        "note": note,
    }


def near_duplicates(rounds: int) -> dict[str, Any]:
    """All pairs with ratio ≥ 0.9 among distinct texts, beside rapidfuzz's own all-against-all with the same cutoff."""
    from rapidfuzz import fuzz, process

    from finetune_assets.corpus.near_duplicates import find_pairs, normalise

    messages = pl.read_parquet(SAMPLE / "messages.parquet").drop_nulls("content")
    texts = normalise(messages["content"]).unique().sort().to_list()[:6000]
    find_pairs(texts[:200])  # compiles
    found: set[tuple[int, int]] = set()
    exact: set[tuple[int, int]] = set()

    def ours() -> None:
        pairs = find_pairs(texts)
        found.update(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))

    def theirs() -> None:
        for start in range(0, len(texts), 1000):
            scores = process.cdist(
                texts[start : start + 1000], texts, scorer=fuzz.ratio, score_cutoff=90, dtype=np.uint8, workers=1
            )
            left, right = np.nonzero(scores)
            exact.update((int(a) + start, int(b)) for a, b in zip(left, right, strict=True) if a + start < b)

    mine, peer = cpu(ours, rounds), cpu(theirs, 1)
    recall = len(found & exact) / max(len(exact), 1)
    return row(
        "near-duplicate pairs, 6,000 short texts",
        "rapidfuzz cdist",
        mine,
        peer,
        f"recall {recall:.4f}, {len(found - exact)} false",
    )


def scrubbing(rounds: int) -> dict[str, Any]:
    """Personal data of all conversations, beside the same recognisers run on every text without the prefilter."""
    from finetune_assets.corpus.personal_data import find, needs_look

    texts = pl.read_parquet(SAMPLE / "messages.parquet").drop_nulls("content")["content"]
    find("llámame al +34 612 345 678")

    def ours() -> int:
        return sum(len(find(text)) for text in texts.filter(needs_look(texts)))

    def theirs() -> int:
        return sum(len(find(text)) for text in texts)

    same = ours() == theirs()
    return row(
        "personal data, 19,000 messages",
        "same recognisers, no prefilter",
        cpu(ours, rounds),
        cpu(theirs, rounds),
        f"same finds: {same}",
    )


def generation(rounds: int) -> dict[str, Any]:
    """Replies of the base model to 96 prompts, beside `model.generate` one at a time."""
    import torch

    from finetune_assets.worker.generate import Generator

    torch.set_num_threads(1)
    generator = Generator(str(ROOT / "data" / "base_model"), 64)
    questions = pl.read_parquet(SAMPLE / "messages.parquet").filter(pl.col("role") == "user")["content"].drop_nulls()[:96]
    encode = generator.tokenizer.apply_chat_template
    prompts = [encode([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False) for q in questions]

    def ours() -> int:
        by_length = sorted(prompts, key=len)
        return sum(reply.tokens for n in range(0, 96, 32) for reply in generator.replies(by_length[n : n + 32]))

    def theirs() -> int:
        count = 0
        for prompt in prompts:
            out = generator.model.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long)
            )
            count += out.shape[1] - len(prompt)
        return count

    return row(
        "greedy replies to 96 prompts, 3M model", "model.generate, one at a time", cpu(ours, rounds), cpu(theirs, 1), "one thread"
    )


def pipeline(rounds: int) -> dict[str, Any]:
    """The whole sample from export to frozen JSONL; no peer yet."""
    from finetune_assets.assistants import load_assistant
    from finetune_assets.corpus.examples import build_examples
    from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
    from finetune_assets.corpus.sources import read_source
    from finetune_assets.dataset import choose, freeze
    from finetune_assets.storage import Store

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            tables = read_source([str(SAMPLE)])
            weeks = stale_weeks(store, tables).stale
            ingest_conversations(store, tables, weeks, b"key")
            ingest_feedback(store, tables, weeks, b"key")
            build_examples(store, weeks)
            assistant = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
            freeze(store, assistant, choose(store, assistant))

    taken = cpu(ours, rounds)
    return {
        "what": "sample of 2,010 conversations: export to frozen JSONL",
        "peer": None,
        "cpu_seconds": round(taken, 3),
        "peer_cpu_seconds": None,
        "ratio": None,
        "note": "",
    }


def main() -> None:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = [part(rounds) for part in (near_duplicates, scrubbing, generation, pipeline)]
    packages = ("polars", "rapidfuzz", "numba", "torch", "transformers", "trl", "dagster")
    results = {
        "command": f"python benchmarks/run.py --rounds {rounds}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in packages},
        "rows": rows,
    }
    (ROOT / "benchmarks" / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{'what':<56}{'ours':>9}  {'peer':>9}  {'ratio':>7}  beside")
    for one in rows:
        peer = f"{one['peer_cpu_seconds']:.3f}" if one["peer"] else "-"
        ratio = f"{one['ratio']:.1f}×" if one["peer"] else "-"
        print(f"{one['what']:<56}{one['cpu_seconds']:>9.3f}  {peer:>9}  {ratio:>7}  {one['peer'] or ''}  {one['note']}")


if __name__ == "__main__":
    main()
