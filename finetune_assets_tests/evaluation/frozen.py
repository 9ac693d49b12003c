"""A small frozen data set, as `freeze` leaves it, and a benchmark on it: for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.dataset.formats import LINEAGE
from finetune_assets.evaluation import benchmark
from finetune_assets.evaluation.candidates import Candidate
from finetune_assets.storage import write_json, write_parquet, write_text
from finetune_assets_tests.tiny_model import dialogues

INTENTS = ("scheduling", "pricing", "hours")


def make_dataset(
    folder: Path, *, train: int = 60, test: int = 30, rows: dict[str, list[list[dict[str, str]]]] | None = None
) -> Path:
    """`rows` gives the chats of a split in place of made ones. Two test rows share a conversation."""
    import json

    chats = {
        "train": dialogues(train, seed=2),
        "validation": dialogues(5, seed=3),
        "test": dialogues(test, seed=4),
        **(rows or {}),
    }
    lineage: list[dict[str, Any]] = []
    for split, split_chats in chats.items():
        write_text(
            folder / f"{split}.jsonl", "".join(json.dumps({"messages": c}, ensure_ascii=False) + "\n" for c in split_chats)
        )
        for line in range(len(split_chats)):
            lineage.append(  # noqa: PERF401
                {
                    "split": split,
                    "line": line,
                    "conversation_id": f"{split}_c{line // 2}",
                    "message_id": f"{split}_m{line}",
                    "tenant_id": "clinic_a" if line % 3 else "clinic_b",
                    "vertical": "dental",
                    "intent": INTENTS[line % 3],
                    "satisfaction_score": 5,
                    "source": "satisfied",
                    "replaced": [],
                    "user": f"u_{split}{line // 2}",
                }
            )
    write_parquet(folder / "lineage.parquet", pl.DataFrame(lineage, schema=LINEAGE))
    split_counts = {split: len(split_chats) for split, split_chats in chats.items()}
    write_json(
        folder / "manifest.json",
        {
            "fingerprint": "f" * 20,
            "assistant": "dental",
            "weeks": ["2026-08-03", "2026-08-10"],
            "counts": {
                "examples": sum(split_counts.values()),
                "split": split_counts,
                "source": {"satisfied": 95},
                "tenant": {"clinic_a": 60},
            },
            "rejected": {"low_satisfaction": 12, "near_duplicate": 7, "no_consent": 3},
            "settings": {},
            "code_version": "1",
            "parents": [],
        },
    )
    return folder


def benchmarked(assistant: Assistant, dataset: Path, asked: Sequence[Candidate], output: Path) -> None:
    """Runs the worker in this process, on one thread; what it measured is in `output`."""
    from finetune_assets.worker import benchmark as worker
    from finetune_assets.worker.progress import Progress

    spec = benchmark.prepare(assistant, dataset, asked, output, threads=1)
    write_json(output / "result.json", worker.run(spec, Progress.open(output)))
