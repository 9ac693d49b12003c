"""The whole sample from export to frozen JSONL."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.measure import ROOT, SAMPLE, Row, cpu
from finetune_assets.assistants import load_assistant
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import read_source
from finetune_assets.dataset import choose, freeze
from finetune_assets.storage import Store


def rows(rounds: int) -> list[Row]:
    """The shipped `dental` assistant."""

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

    return [Row("sample of 2,010 conversations: export to frozen JSONL", cpu(ours, rounds))]
