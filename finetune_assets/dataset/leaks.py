"""Proof, from the frozen files alone, that the splits share no conversation, no user and no near-duplicate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.dataset.duplicates import twins_in, with_text
from finetune_assets.dataset.formats import FILES, FileSpec, Row, read_lines
from finetune_assets.dataset.splits import TEST, TRAIN, VALIDATION
from finetune_assets.storage import read_json


def check_leaks(folder: Path, threshold: float | None = None) -> list[str]:
    """What is wrong with a frozen data set, one sentence each; empty: nothing. `threshold` is by default that of its manifest."""
    if threshold is None:
        threshold = float(read_json(folder / "manifest.json")["settings"]["filters"]["near_duplicate"])
    return examine(folder, threshold)[0]


def examine(folder: Path, threshold: float) -> tuple[list[str], dict[str, int]]:
    """The problems, at most 20 of a kind, and how many conversations, users and distinct texts were compared.

    Compared are conversations and users of all files, and the texts (user turn and target reply) of everything that is trained on
    with everything that is held out, and of validation.jsonl with test.jsonl.
    """
    problems, rows = _rows(folder)
    for column in ("conversation_id", "user"):
        shared = (
            rows.drop_nulls(column)
            .group_by(column)
            .agg(splits=pl.col("split").unique().sort())
            .filter(pl.col("splits").list.len() > 1)
        )
        for value, splits in shared.sort(column).head(20).rows():
            problems.append(f"{column} {value} stands in {' and '.join(splits)}")
    rows = with_text(rows, "reply")
    train, heldout = rows.filter(pl.col("split") == TRAIN), rows.filter(pl.col("split") != TRAIN)
    examples = heldout.filter(pl.col("kind") == "examples")
    problems += _twins(train, heldout, threshold)
    problems += _twins(examples.filter(pl.col("split") == VALIDATION), examples.filter(pl.col("split") == TEST), threshold)
    compared = {
        "conversations": rows["conversation_id"].n_unique(),
        "users": rows["user"].drop_nulls().n_unique(),
        "texts": rows["text"].n_unique(),
    }
    return problems, compared


def _twins(some: pl.DataFrame, others: pl.DataFrame, threshold: float) -> list[str]:
    found = twins_in(some["text"], others["text"], threshold)
    hits = [(row, int(other)) for row, other in enumerate(found.tolist()) if other >= 0]
    return [f"{_name(some, row)} is a near-duplicate of {_name(others, other)}" for row, other in hits[:20]]


def _name(frame: pl.DataFrame, row: int) -> str:
    at = frame.row(row, named=True)
    return f"{at['file']}:{at['line']} ({at['message_id']})"


def _rows(folder: Path) -> tuple[list[str], pl.DataFrame]:
    """file, kind, split, line, ids, user_text and reply of every row, and where files and lineage disagree."""
    problems: list[str] = []
    parts: list[pl.DataFrame] = []
    for spec in FILES:
        lineage = pl.read_parquet(folder / spec.lineage).filter(pl.col("split").is_in(spec.splits)).sort("line")
        texts = [_text(spec, row) for row in read_lines(folder / spec.name)]
        if lineage["line"].to_list() != list(range(len(texts))):
            problems.append(f"{spec.name} has {len(texts)} lines, {spec.lineage} describes {lineage.height} of it")
            continue
        columns: dict[str, Any] = {"user_text": [t[0] for t in texts], "reply": [t[1] for t in texts]}
        text = pl.DataFrame(columns, schema={"user_text": pl.String, "reply": pl.String})
        ids = lineage.select("split", "line", "conversation_id", "message_id", "user")
        parts.append(pl.concat([ids, text], how="horizontal").with_columns(file=pl.lit(spec.name), kind=pl.lit(spec.kind)))
    empty = pl.DataFrame(
        schema={**dict.fromkeys(["split", "conversation_id", "message_id", "user"], pl.String), "line": pl.Int64}
    )
    empty = empty.with_columns(pl.lit("").alias(name) for name in ("user_text", "reply", "file", "kind"))
    return problems, pl.concat([*parts, empty], how="diagonal")


def _text(spec: FileSpec, row: Row) -> tuple[str, str]:
    if spec.kind == "examples":
        return row["messages"][-2]["content"], row["messages"][-1]["content"]
    target = row["chosen"] if spec.kind == "preferences" else row["completion"]
    return row["prompt"][-1]["content"], target[0]["content"]
