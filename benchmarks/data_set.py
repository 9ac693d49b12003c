"""JSON lines beside `json.dumps`, and a data set chosen and frozen from many examples.

The examples are the sample's, again and again: in each copy every word becomes another one of like length, so that no two copies
are near-duplicates and the rules have as much to do as on the sample. Users, conversations and feedback are copied with them.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.exports import corpus_of
from benchmarks.measure import ROOT, SAMPLE, Row, cpu, peak_mb
from finetune_assets.assistants import load_assistant
from finetune_assets.corpus.schema import EXAMPLES
from finetune_assets.dataset import choose, freeze
from finetune_assets.dataset.lines import texts_of
from finetune_assets.storage import Store, read_json, write_json, write_parquet

SIZES = (100_000, 600_000)


def rows(rounds: int) -> list[Row]:
    """The shipped `dental` assistant; the smaller corpus first, since memory is the process's peak."""
    assistant = load_assistant(ROOT / "finetune_assets" / "assistants", "dental")
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        sample = corpus_of(SAMPLE, Path(folder) / "sample")
        choose(sample, assistant)  # compiles
        for size in SIZES:
            store = _copied(sample, Path(folder) / str(size), size)
            taken = cpu(lambda store=store: freeze(store, assistant, choose(store, assistant)), 1)
            made = read_json(store.datasets("dental") / "latest" / "manifest.json")
            note = f"{made['counts']['examples']:,} kept; leak check included"
            found.append(Row(f"choose and freeze, {made['read']:,} examples", taken, peak_mb=peak_mb(), note=note))
            if size == SIZES[0]:
                found.insert(0, _json_lines(store, rounds))
    return found


def _json_lines(store: Store, rounds: int) -> Row:
    files = sorted(store.home.glob("corpus/examples/week=*/part-*.parquet"))
    frame = pl.read_parquet(files, hive_partitioning=False).with_columns(split=pl.lit("train"), source=pl.lit("satisfied"))
    system = "Eres el asistente de una clínica dental."

    def theirs() -> list[str]:
        return [_dumped(system, row) for row in frame.select("context", "reply").iter_rows(named=True)]

    def ours() -> list[str]:
        return texts_of("examples", frame, system).to_list()

    same = ours() == theirs()
    mine, peer = cpu(ours, rounds), cpu(theirs, rounds)
    note = f"same lines: {same}"
    return Row(f"JSON lines, {frame.height:,} examples", mine, "json.dumps", peer, bar="≥ 5×", met=peer / mine >= 5, note=note)


def _dumped(system: str, row: dict[str, Any]) -> str:
    said = [{"role": "system", "content": system}, *row["context"], {"role": "assistant", "content": row["reply"]}]
    return json.dumps({"messages": said}, ensure_ascii=False, separators=(",", ":"))


def _copied(sample: Store, home: Path, size: int) -> Store:
    store = Store(home)
    write_json(store.tenants, read_json(sample.tenants))
    examples, feedback = (
        pl.read_parquet(sorted(sample.home.glob(f"corpus/{table}/week=*/part.parquet")), hive_partitioning=False)
        for table in ("examples", "feedback")
    )
    examples = examples.filter(pl.col("vertical") == "dental")
    words = sorted({word for text in examples["reply"] for word in text.split() if word.isalpha()}, key=lambda w: (len(w), w))
    for copy in range(-(-size // examples.height)):
        chance, mapping = random.Random(copy), {}
        for first in range(0, len(words), 40):
            group = words[first : first + 40]
            mapping.update(zip(group, chance.sample(group, len(group)) if copy else group, strict=True))
        _write(store, "examples", _copy(examples, copy, mapping).head(size - copy * examples.height), "started_at", copy)
        ids = [pl.col(name) + f"_{copy}" for name in ("message_id", "conversation_id", "feedback_id")]
        _write(store, "feedback", feedback.with_columns(ids), "created_at", copy)
    return store


def _copy(examples: pl.DataFrame, copy: int, mapping: dict[str, str]) -> pl.DataFrame:
    def other(text: pl.Expr) -> pl.Expr:
        return text.str.split(" ").list.eval(pl.element().replace(mapping)).list.join(" ")

    said = examples.with_columns(other(pl.col("user_text")), other(pl.col("reply")))
    last = pl.struct(role=pl.lit("user"), content="user_text")
    return said.with_columns(
        *[pl.col(name) + f"_{copy}" for name in ("message_id", "conversation_id", "user")],
        context=pl.concat_list(pl.col("context").list.head(pl.col("context").list.len() - 1), last),
        bucket=((pl.col("bucket").cast(pl.Int64) + 37 * copy) % 10_000).cast(pl.UInt16),
        text_key=pl.concat_str("user_text", "reply").hash(),
    ).select(*EXAMPLES)


def _write(store: Store, table: str, frame: pl.DataFrame, time: str, copy: int) -> None:
    dated = frame.with_columns(week=pl.col(time).dt.truncate("1w").dt.strftime("%Y-%m-%d"))
    for (week,), part in dated.group_by("week"):
        write_parquet(store.corpus(table, str(week)) / f"part-{copy:04d}.parquet", part.drop("week"))
