"""Exports of any size with known truth, made from a real one by perturbation, and the corpus that is built from an export.

    python -m benchmarks.exports FOLDER [--conversations 100000] [--weeks 52] [--messages N] [--seed 1]

The conversations of `../shared/data/sgd` (else of the sample) are copied again and again: new ids (UUIDs) and users, times spread
evenly over the weeks, and in each copy half of the plain words become others of the same length, the same ones in the whole
copy. So what was planted holds in each copy (`truth.json`: broken rows, duplicates, personal data, corrections), and two copies
of a text are mostly no near-duplicates. `--messages` cuts conversations.
All are of the vertical `dental`. A file a table and week.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from benchmarks.measure import ROOT, SAMPLE
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import read_source
from finetune_assets.storage import Store

SGD = ROOT.parent / "shared" / "data" / "sgd"
BASE = SGD if SGD.is_dir() else SAMPLE
MADE = f"made from {'data/sample' if BASE == SAMPLE else 'sgd'}"
"""For a row's note: exports of another base have longer or shorter conversations."""
EXPORTS = (SAMPLE, SGD)
"""Exports with a `truth.json`; the second one may not be there."""
TABLES = ("conversations", "messages", "feedback")
IDS = ("conversation_id", "message_id", "feedback_id")
FIRST = datetime(2025, 9, 1, tzinfo=UTC)  # a Monday
PLAIN = r"^[a-záéíóúñü]{3,}$"  # words that may change: no name, number or address
CHANGED = 0.5
Truth = dict[str, Any]


def corpus_of(source: Path | str, home: Path) -> Store:
    """A fresh store with every week of a source: conversations, feedback, examples."""
    store, tables = Store(home), read_source([str(source)])
    weeks = stale_weeks(store, tables).stale
    ingest_conversations(store, tables, weeks, b"key")
    ingest_feedback(store, tables, weeks, b"key")
    build_examples(store, weeks)
    return store


def make(folder: Path, conversations: int, weeks: int, messages: int | None = None, seed: int = 1) -> dict[str, int]:
    """Writes the export; gives the rows of each table."""
    base, truth = _base(messages)
    count, draw = base["conversations"]["of"].n_unique(), np.random.default_rng(seed)
    spoken = base["messages"]["content"].drop_nulls().str.split(" ").explode()
    words = spoken.filter(spoken.str.contains(PLAIN)).unique().sort()
    kept = {one["message_id"] for one in truth["pii"]}
    rows: dict[str, int] = dict.fromkeys(TABLES, 0)
    for week in range(weeks):
        start = FIRST + timedelta(weeks=week)
        numbers = np.arange(round(week * conversations / weeks), round((week + 1) * conversations / weeks))
        begun = pl.lit(start).dt.cast_time_unit("us") + pl.duration(microseconds=(pl.col("at") * 1e6).cast(pl.Int64))
        picked = pl.DataFrame(
            {"copy": numbers // count, "of": numbers % count, "at": np.sort(draw.uniform(0, 6.9 * 86_400, len(numbers)))}
        ).select("copy", "of", begun=begun)
        parts: dict[str, list[pl.DataFrame]] = {table: [] for table in base}
        for (copy,), own in picked.partition_by("copy", as_dict=True, maintain_order=True).items():
            for table, frame in base.items():
                made = frame.join(own.drop("copy"), on="of", how="inner", maintain_order="left")
                parts[table].append(_copied(made, table, int(copy), _changes(words, int(copy), seed), kept))
        for table, frames in parts.items():
            target = folder / table / f"{start:%Y-%m-%d}.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            frame = pl.concat(frames) if frames else base[table].head(0).drop("of", "first")
            frame.write_parquet(target)
            rows[table] += frame.height
    told = _truth_of(truth, base, conversations, count)
    (folder / "truth.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    return rows


def _base(messages: int | None) -> tuple[dict[str, pl.DataFrame], Truth]:
    """The real tables with `of`, the number of the conversation a row stands with, and `first`, when that one started."""
    tables = {table: pl.read_parquet(BASE / f"{table}.parquet") for table in TABLES}
    begun = tables["conversations"].drop_nulls(("conversation_id", "started_at")).unique("conversation_id", keep="first")
    begun = begun.select("conversation_id", first="started_at").sort("conversation_id").with_row_index("of")
    begun = begun.with_columns(pl.col("of").cast(pl.Int64))
    for table, frame in tables.items():
        joined = frame.join(begun, on="conversation_id", how="left", maintain_order="left")
        stray = pl.lit(begun["first"][0])  # what belongs to no conversation goes with the first one
        tables[table] = joined.with_columns(pl.col("of").fill_null(0), pl.col("first").fill_null(stray))
    if messages is not None:
        said = tables["messages"].sort("created_at", "message_id", maintain_order=True)
        tables["messages"] = said.filter(pl.int_range(pl.len()).over("of") < messages)
        gone = said.filter(pl.int_range(pl.len()).over("of") >= messages)["message_id"].drop_nulls()
        tables["feedback"] = tables["feedback"].filter(~pl.col("message_id").is_in(gone.implode()).fill_null(False))
    tables["conversations"] = tables["conversations"].with_columns(vertical=pl.lit("dental"))
    return tables, json.loads((BASE / "truth.json").read_text(encoding="utf-8"))


def _changes(words: pl.Series, copy: int, seed: int) -> dict[str, str]:
    """The words that change in a copy, and what they become; none in the first copy."""
    if copy == 0:
        return {}
    draw = np.random.default_rng((seed, copy))
    frame = pl.DataFrame({"word": words, "other": words.gather(draw.permutation(len(words)))})
    frame = pl.concat(  # n-th word of a length for n-th word of that length
        [
            frame.select("word", size=pl.col("word").str.len_chars()).sort("size", maintain_order=True),
            frame.select("other", _size=pl.col("other").str.len_chars()).sort("_size", maintain_order=True),
        ],
        how="horizontal",
    ).filter(pl.Series(draw.random(len(words)) < CHANGED))
    return dict(frame.select("word", "other").iter_rows())


def _copied(rows: pl.DataFrame, table: str, copy: int, changes: dict[str, str], kept: set[str]) -> pl.DataFrame:
    shift = pl.col("begun") - pl.col("first")
    times = [name for name in ("started_at", "ended_at", "created_at") if name in rows.columns]
    for name in ("content", "expected_response", "comment"):
        if name in rows.columns:
            rows = rows.with_columns(_reworded(rows[name], rows["message_id"].is_in(list(kept)), changes))
    ids = [own_ids(rows[name], copy) for name in IDS if name in rows.columns]
    users = [pl.col("user_id") + f"_{copy}"] if table == "conversations" else []
    return rows.with_columns(*ids, *users, *(pl.col(name) + shift for name in times)).drop("of", "first", "begun")


def _reworded(texts: pl.Series, stay: pl.Series, changes: dict[str, str]) -> pl.Series:
    """A text of which nothing changes stays as it is, and so does null."""
    if not changes or texts.is_empty():
        return texts
    said = texts.to_frame("text").with_row_index("row").filter(~stay.fill_null(False) & texts.is_not_null())
    words = said.with_columns(pl.col("text").str.split(" ")).explode("text").with_columns(pl.col("text").replace(changes))
    made = words.group_by("row", maintain_order=True).agg(pl.col("text").str.join(" "))
    return texts.clone().scatter(made["row"], made["text"])


def own_ids(ids: pl.Series, copy: int) -> pl.Series:
    """A UUID for each id of a copy, as most platforms have; null stays null."""
    keys = ids + f"_{copy}"
    digits = np.column_stack([keys.hash(seed).to_numpy() for seed in (1, 2)]).tobytes().hex().encode()
    whole = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(ids), [None, pa.py_buffer(digits)])
    text = pl.DataFrame({"t": pl.from_arrow(whole.cast(pa.binary()).cast(pa.string()))}, strict=False)
    parts = [pl.col("t").str.slice(first, size) for first, size in ((0, 8), (8, 4), (12, 4), (16, 4), (20, 12))]
    made = text.with_columns(ids.alias("id")).select(
        pl.when(pl.col("id").is_not_null()).then(pl.concat_str(parts, separator="-")).alias(ids.name)
    )
    return made.to_series()


def _truth_of(truth: Truth, base: dict[str, pl.DataFrame], conversations: int, count: int) -> Truth:
    """What was planted, for each copy that is there in full or in part."""
    place: dict[str, dict[str, int]] = {
        table: dict(base[table].drop_nulls(name).select(name, "of").unique(name, keep="first").iter_rows())
        for table, name in zip(TABLES, IDS, strict=True)
    }
    made: Truth = {"own_contacts": truth.get("own_contacts", {})}
    for kind, entries in truth.items():
        if kind == "own_contacts":
            continue
        table = "conversations" if kind.endswith("duplicates") else "messages"
        found: list[tuple[int, list[str], Any]] = []
        for entry in entries:
            named: list[str] = entry if isinstance(entry, list) else [_id_of(entry)]
            places = place[str(entry["table"]) if kind == "bad_rows" else table]
            if all(name in places for name in named) and not (kind == "bad_rows" and _alone(entry, base)):
                found.append((max(places[name] for name in named), named, entry))
        made[kind] = []
        for copy in range(-(-conversations // count)):
            there = [(named, entry) for of, named, entry in found if copy * count + of < conversations]
            ids = iter(own_ids(pl.Series("id", [name for named, _ in there for name in named], dtype=pl.String), copy))
            made[kind] += [_renamed(entry, [next(ids) for _ in named]) for named, entry in there]
    return made


def _alone(entry: dict[str, str], base: dict[str, pl.DataFrame]) -> bool:
    """Whether a repeated id occurs once only, since the conversation of the other row was cut before it."""
    name = dict(zip(TABLES, IDS, strict=True))[entry["table"]]
    return "repeated" in entry["reason"] and int((base[entry["table"]][name] == entry["id"]).sum()) < 2


def _id_of(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry.get("message_id") or entry.get("id"))


def _renamed(entry: Any, ids: list[str]) -> Any:
    if isinstance(entry, list):
        return ids
    return ids[0] if isinstance(entry, str) else {**entry, "message_id" if "message_id" in entry else "id": ids[0]}


def main() -> None:
    """Writes an export and prints its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--weeks", type=int, default=52)
    parser.add_argument("--messages", type=int, help="most messages of a conversation; default: all")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(json.dumps(make(given.folder, given.conversations, given.weeks, given.messages, given.seed)))


if __name__ == "__main__":
    main()
