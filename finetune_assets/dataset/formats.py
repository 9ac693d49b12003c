"""The files of a frozen data set: their names, what they hold, and the lineage that says where each line comes from.

Lines stand in the order of a hash of their text, so a file depends on its content alone, and ids occur only in the lineage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.corpus.schema import TIME
from finetune_assets.dataset.splits import SPLITS, TEST, TRAIN, VALIDATION
from finetune_assets.storage import replacing, write_parquet

LINEAGE: dict[str, Any] = {
    "split": pl.String,
    "line": pl.Int64,  # from 0, within its file
    "turn": pl.Int64,  # place of the target among the line's messages; with `rows: per_conversation` a line has several targets
    "conversation_id": pl.String,
    "message_id": pl.String,  # of a synthetic row: the message that it varies
    "tenant_id": pl.String,
    "vertical": pl.String,
    "intent": pl.String,
    "satisfaction_score": pl.Int8,
    "source": pl.String,
    "replaced": pl.List(pl.String),
    "user": pl.String,  # pseudonym: proves that no person stands in two splits, and finds a person's rows
    "started_at": TIME,  # of the conversation: proves a split by time
}
"""One row a target."""
Row = dict[str, Any]
_AT_ONCE = 100_000  # lines written at a time


@dataclass(frozen=True)
class FileSpec:
    """One JSONL file: its name, the splits whose rows it holds, and the lineage file that describes it."""

    name: str
    kind: str  # examples, preferences, kto
    splits: tuple[str, ...]
    lineage: str


FILES: tuple[FileSpec, ...] = (
    *(FileSpec(f"{split}.jsonl", "examples", (split,), "lineage.parquet") for split in SPLITS),
    FileSpec("preferences.jsonl", "preferences", (TRAIN,), "preferences_lineage.parquet"),
    FileSpec("preferences_heldout.jsonl", "preferences", (VALIDATION, TEST), "preferences_lineage.parquet"),
    FileSpec("kto.jsonl", "kto", (TRAIN,), "kto_lineage.parquet"),
    FileSpec("kto_heldout.jsonl", "kto", (VALIDATION, TEST), "kto_lineage.parquet"),
)


def trim_context(frame: pl.DataFrame, turns: int, chars: int) -> pl.DataFrame:
    """Cuts `context` to its newest turns within both bounds, from a user's turn on. The user's last turn always stays."""
    size = pl.col("context").list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()
    starts_with_user = pl.col("context").list.first().struct.field("role") == "user"
    fits = (pl.col("context").list.len() <= turns) & (size <= chars) & starts_with_user
    long = frame.select(~fits).to_series().arg_true()
    if long.is_empty():
        return frame
    flat = (
        frame.select(context=pl.col("context").gather(long))
        .with_row_index("row")
        .explode("context")
        .unnest("context")
        .with_columns(
            back=pl.len().over("row") - 1 - pl.int_range(pl.len()).over("row"),
            size=pl.col("content").str.len_chars().cast(pl.Int64).cum_sum(reverse=True).over("row"),
        )
        .filter((pl.col("back") == 0) | ((pl.col("back") < turns) & (pl.col("size") <= chars)))
        .filter((pl.col("role") == "user").cast(pl.Int8).cum_max().over("row") == 1)
    )
    kept = flat.group_by("row", maintain_order=True).agg(cut=pl.struct("role", "content"))
    cut = kept.select(pl.col("cut"), at=long)
    numbered = frame.with_row_index("at").join(
        cut.with_columns(pl.col("at").cast(pl.UInt32)), on="at", how="left", maintain_order="left"
    )
    return numbered.with_columns(context=pl.coalesce("cut", "context")).drop("at", "cut")


def write_files(folder: Path, frames: dict[str, pl.DataFrame]) -> None:
    """Writes every JSONL file and lineage; `frames` maps kind to `lines_of`. An empty file is written too."""
    lineages: dict[str, list[pl.DataFrame]] = {}
    for spec in FILES:
        rows = frames[spec.kind].filter(pl.col("split").is_in(spec.splits))
        lines = rows["jsonl"].drop_nulls()
        with replacing(folder / spec.name) as draft, draft.open("wb") as file:
            for first in range(0, len(lines), _AT_ONCE):
                text = lines.slice(first, _AT_ONCE).str.join("\n").item()
                file.write(f"{text}\n".encode())
        numbered = rows.with_columns(line=pl.col("jsonl").is_not_null().cum_sum().cast(pl.Int64) - 1)
        lineages.setdefault(spec.lineage, []).append(numbered.select(pl.col(name).cast(dtype) for name, dtype in LINEAGE.items()))
    for name, parts in lineages.items():
        write_parquet(folder / name, pl.concat(parts))


def read_lines(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


_MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String, "weight": pl.Int8}))
_SCHEMA: dict[str, dict[str, Any]] = {
    "examples": {"messages": _MESSAGES},
    "preferences": {"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES},
    "kto": {"prompt": _MESSAGES, "completion": _MESSAGES, "label": pl.Boolean},
}
_TARGET = {"preferences": "chosen", "kto": "completion"}


def read_targets(folder: Path, spec: FileSpec, lines: int | None = None) -> pl.DataFrame:
    """line, turn, user_text and reply of everything in a file that is trained on or asked for; of its first `lines` alone.

    Targets are the assistant's messages of weight 1; where no message has a weight, the last one.
    """
    path = folder / spec.name
    empty = pl.DataFrame(schema={"line": pl.Int64, "turn": pl.Int64, "user_text": pl.String, "reply": pl.String})
    if path.stat().st_size == 0:
        return empty
    rows = pl.scan_ndjson(path, schema=_SCHEMA[spec.kind], n_rows=lines).collect().with_row_index("line")
    if spec.kind != "examples":
        said = pl.col(_TARGET[spec.kind]).list.first().struct.field("content")
        asked = pl.col("prompt").list.last().struct.field("content")
        made = rows.select("line", turn=pl.col("prompt").list.len(), user_text=asked, reply=said)
        return made.cast(empty.schema)  # pyright: ignore[reportArgumentType]
    flat = rows.explode("messages").unnest("messages").with_columns(turn=pl.int_range(pl.len()).over("line"))
    flat = flat.with_columns(
        user_text=pl.col("content").shift(1).over("line"),
        weighted=pl.col("weight").is_not_null().any().over("line"),
        last=pl.col("turn") == pl.len().over("line") - 1,
    )
    targets = flat.filter(pl.when("weighted").then(pl.col("weight").fill_null(0) == 1).otherwise("last"))
    return targets.select("line", "turn", "user_text", reply="content").cast(empty.schema)  # pyright: ignore[reportArgumentType]
