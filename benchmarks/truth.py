"""What became of everything that was planted in an export: broken rows, duplicates, wrong replies, corrections.

    python -m benchmarks.truth [FOLDER …]     default: the sample, and ../shared/data/sgd where it is there

FOLDER is an export with `truth.json` (`bad_rows`, `exact_duplicates`, `near_duplicates`, `bad_replies`, `corrected`). One
assistant with default settings is built for each vertical. `benchmarks.privacy` does the same for personal data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
from rapidfuzz.fuzz import ratio

from benchmarks.privacy import EXPORTS
from finetune_assets.assistants import Assistant
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.near_duplicates import normalise
from finetune_assets.corpus.sources import read_source
from finetune_assets.dataset import choose
from finetune_assets.storage import Store

Truth = dict[str, Any]


def lines(folder: Path) -> Iterator[str]:
    """One line a kind of planted row: how many there are, and of how many the right thing became."""
    truth: Truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as home:
        store = Store(Path(home))
        tables = read_source([str(folder)])
        weeks = stale_weeks(store, tables).stale
        ingest_conversations(store, tables, weeks, b"key")
        ingest_feedback(store, tables, weeks, b"key")
        build_examples(store, weeks)
        rejected = pl.read_parquet(f"{home}/corpus/rejected/**/*.parquet", hive_partitioning=False)
        examples = pl.read_parquet(f"{home}/corpus/examples/**/*.parquet", hive_partitioning=False)
        settings = [
            {"name": "truth", "select": {"vertical": vertical}, "augment": {"share": 0}}
            for vertical in sorted(examples["vertical"].unique())
        ]
        chosen = [choose(store, Assistant.model_validate(one)).kept for one in settings]
    kept = pl.concat([frame.select("message_id", "conversation_id", "source", "user_text", "reply") for frame in chosen])
    set_aside = {(row["table"], row["id"]): row["reason"] for row in rejected.iter_rows(named=True)}
    found = sum((row["table"], row["id"]) in set_aside for row in truth["bad_rows"])
    yield _line("broken rows set aside with a reason", found, len(truth["bad_rows"]))
    for name in ("exact_duplicates", "near_duplicates"):
        pairs = truth[name]
        yield _line(f"{name.replace('_', ' ')} that give no example twice", len(pairs) - _twice(kept, pairs), len(pairs))
    corrected = set(kept.filter(pl.col("source") == "corrected")["message_id"])
    targets = set(kept["message_id"]) - corrected
    yield _line("wrong replies that are no target", len(set(truth["bad_replies"]) - targets), len(set(truth["bad_replies"])))
    answered = set(examples["message_id"]) & set(truth["corrected"])
    yield _line("corrections that are the reply", len(answered & corrected), len(answered))


def _line(what: str, found: int, planted: int) -> str:
    return f"  {found / max(planted, 1):7.2%} of {planted:>5}  {what}"


def _twice(kept: pl.DataFrame, pairs: list[list[str]]) -> int:
    """Pairs of conversations of which two examples stay that are near-duplicates (rapidfuzz ratio of 90 and more)."""
    texts = kept.select("conversation_id", text=normalise(kept["user_text"]) + "\n" + normalise(kept["reply"]))
    by_conversation = {str(key[0]): group["text"].to_list() for key, group in texts.group_by("conversation_id")}
    return sum(
        any(ratio(a, b) >= 90 for a in by_conversation.get(one, []) for b in by_conversation.get(other, []))
        for one, other in pairs
    )


def main() -> None:
    """Prints the figures of each export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    folders = parser.parse_args().folders or [folder for folder in EXPORTS if (folder / "truth.json").exists()]
    for folder in folders:
        print(f"{folder.resolve().name}:")
        for line in lines(folder):
            print(line)


if __name__ == "__main__":
    main()
