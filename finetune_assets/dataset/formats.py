"""Examples as JSON lines, and the lineage that says where each line comes from.

    train, validation, test      {"messages": [system?, user, …, assistant]}
    preferences(_heldout)        {"prompt": […], "chosen": [assistant], "rejected": [assistant]}     TRL conversational
    kto(_heldout)                {"prompt": […], "completion": [assistant], "label": true | false}   TRL conversational

Lines stand in the order of a hash of their text, so a file depends on its content alone, and ids occur only in the lineage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.dataset.splits import SPLITS, TEST, TRAIN, VALIDATION
from finetune_assets.storage import write_parquet, write_text

LINEAGE: dict[str, Any] = {
    "split": pl.String,
    "line": pl.Int64,
    "conversation_id": pl.String,
    "message_id": pl.String,
    "tenant_id": pl.String,
    "vertical": pl.String,
    "intent": pl.String,
    "satisfaction_score": pl.Int8,
    "source": pl.String,
    "replaced": pl.List(pl.String),
    "user": pl.String,  # pseudonym: proves that no person stands in two splits, and finds a person's rows
}
Row = dict[str, Any]


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
    flat = (
        frame.select("context")
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
    kept = flat.group_by("row", maintain_order=True).agg(context=pl.struct("role", "content"))
    return frame.drop("context").with_row_index("row").join(kept, on="row", how="left", maintain_order="left").drop("row")


def example_line(system: str, row: Row) -> str:
    """`row` has context and reply."""
    return _json({"messages": [*_prompt(system, row), _said(row["reply"])]})


def preference_line(system: str, row: Row) -> str:
    """`row` has context, chosen and rejected."""
    return _json({"prompt": _prompt(system, row), "chosen": [_said(row["chosen"])], "rejected": [_said(row["rejected"])]})


def kto_line(system: str, row: Row) -> str:
    """`row` has context, completion and label."""
    return _json({"prompt": _prompt(system, row), "completion": [_said(row["completion"])], "label": row["label"]})


LINE: dict[str, Callable[[str, Row], str]] = {"examples": example_line, "preferences": preference_line, "kto": kto_line}
COLUMNS = {
    "examples": ["context", "reply"],
    "preferences": ["context", "chosen", "rejected"],
    "kto": ["context", "completion", "label"],
}


def _prompt(system: str, row: Row) -> list[Row]:
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["context"]]
    return [{"role": "system", "content": system}, *turns] if system else turns


def _said(text: str) -> Row:
    return {"role": "assistant", "content": text}


_BREAKS = str.maketrans({"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"})  # line ends to some readers


def _json(value: Row) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_BREAKS)


def digest(line: str) -> str:
    """The hash that orders lines and stands for them in the fingerprint."""
    return hashlib.blake2b(line.encode(), digest_size=16).hexdigest()


def lines_of(kind: str, frame: pl.DataFrame, system: str) -> pl.DataFrame:
    """The frame with `jsonl` and `digest`, in the order of the digests; ties by split and message id."""
    make = LINE[kind]
    texts = [make(system, row) for row in frame.select(COLUMNS[kind]).iter_rows(named=True)]
    made = frame.with_columns(
        pl.Series("jsonl", texts, dtype=pl.String), pl.Series("digest", [digest(t) for t in texts], dtype=pl.String)
    )
    return made.sort("digest", "split", "message_id")


def write_files(folder: Path, frames: dict[str, pl.DataFrame]) -> None:
    """Writes every JSONL file and lineage; `frames` maps kind to `lines_of`. An empty file is written too."""
    lineages: dict[str, list[pl.DataFrame]] = {}
    for spec in FILES:
        rows = frames[spec.kind].filter(pl.col("split").is_in(spec.splits))
        write_text(folder / spec.name, "".join(f"{line}\n" for line in rows["jsonl"]))
        numbered = rows.with_columns(line=pl.int_range(pl.len(), dtype=pl.Int64))
        lineages.setdefault(spec.lineage, []).append(numbered.select(pl.col(name).cast(dtype) for name, dtype in LINEAGE.items()))
    for name, parts in lineages.items():
        write_parquet(folder / name, pl.concat(parts))


def read_lines(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)
