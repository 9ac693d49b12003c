"""Raw export to frozen JSONL: the sample, and 10,000 conversations beside a pipeline of pandas, re and datasketch."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.measure import ROOT, SAMPLE, Row, cpu, peak_mb, peer
from finetune_assets.assistants import Assistant, load_assistant
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import read_source
from finetune_assets.dataset import choose, freeze
from finetune_assets.storage import Store

SHARED = ROOT.parent / "shared" / "data" / "sgd"
PLAIN = re.compile(r"^[a-záéíóúñü]{3,}$")  # so that copies hold as much personal data as the real ones
TABLES = ("conversations", "messages", "feedback")


def rows(rounds: int) -> list[Row]:
    """The shipped `dental` assistant; then one with default settings over every conversation."""
    dental = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
    made = [Row("sample of 2,010 conversations: export to frozen JSONL", cpu(lambda: build(SAMPLE, dental), rounds))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbers = export(folder, 10_000)
        everyone = Assistant.model_validate(
            {"name": "everyone", "select": {"vertical": "dental"}, "system_prompt": "Eres amable."}
        )
        kept: list[int] = []
        mine = cpu(lambda: kept.append(build(folder, everyone)), rounds)
        theirs = peer("pipeline", str(folder))
    what = f"10,000 conversations, {numbers['messages']:,} messages: export to JSONL"
    bar = "≥ 20 times"
    if isinstance(theirs, str):
        return [*made, Row(what, mine, "pandas + datasketch", peak_mb=peak_mb(), bar=bar, note=theirs)]
    note = f"{kept[0]:,} rows, theirs {theirs['rows']:,}; we also write reasons, lineage, preferences and the proof of no leak"
    beside, seconds = f"pandas + datasketch {theirs['version']}", theirs["cpu_seconds"]
    return [*made, Row(what, mine, beside, seconds, peak_mb=peak_mb(), bar=bar, met=seconds >= 20 * mine, note=note)]


def build(source: Path, assistant: Assistant) -> int:
    """Every step in a fresh store; the rows that were frozen."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        tables = read_source([str(source)])
        weeks = stale_weeks(store, tables).stale
        ingest_conversations(store, tables, weeks, b"key")
        ingest_feedback(store, tables, weeks, b"key")
        build_examples(store, weeks)
        choice = choose(store, assistant)
        freeze(store, assistant, choice)
        return choice.kept.height


def export(folder: Path, conversations: int) -> dict[str, int]:
    """Writes copies of a real export with new ids and users, a fifth of their plain words changed; the rows of each table."""
    base = {table: pl.read_parquet((SHARED if SHARED.is_dir() else SAMPLE) / f"{table}.parquet") for table in TABLES}
    count = base["conversations"]["conversation_id"].n_unique()
    draw = np.random.default_rng(1)
    words = base["messages"]["content"].drop_nulls().str.split(" ").explode().drop_nulls()
    words = words.filter(words.str.contains(PLAIN.pattern)).to_numpy()
    parts: dict[str, list[pl.DataFrame]] = {table: [] for table in TABLES}
    first = base["conversations"].unique("conversation_id", keep="first", maintain_order=True)
    for copy in range(-(-conversations // count)):
        chosen = first.head(min(count, conversations - copy * count))
        for table, frame in base.items():
            part = chosen if table == "conversations" else frame.join(chosen, on="conversation_id", how="semi")
            names = [n for n in ("conversation_id", "message_id", "feedback_id", "user_id") if n in part.columns]
            part = part.with_columns(pl.col(name) + chr(97 + copy) for name in names)
            if table == "messages" and copy:
                texts = [_changed(text, words, draw) for text in part["content"]]
                part = part.with_columns(pl.Series("content", texts, dtype=pl.String))
            parts[table].append(part.with_columns(pl.lit("dental").alias("vertical")) if table == "conversations" else part)
    made = {table: pl.concat(frames) for table, frames in parts.items()}
    for table, frame in made.items():
        frame.write_parquet(folder / f"{table}.parquet")
    return {table: frame.height for table, frame in made.items()}


def _changed(text: str | None, words: np.ndarray, draw: np.random.Generator) -> str | None:
    if not text:
        return text
    parts = text.split(" ")
    for place in draw.integers(len(parts), size=max(1, len(parts) // 5)):
        if PLAIN.match(parts[place]):
            parts[place] = str(words[draw.integers(len(words))])
    return " ".join(parts)
