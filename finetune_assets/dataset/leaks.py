"""Proof, from the frozen files alone, that the splits share nothing, and that every row is one of the assistant's own.

Compared are conversations and users of all files, and the texts (user turn and target reply) of everything that is trained on
with everything that is held out, and of validation.jsonl with test.jsonl. With `split: {mode: time}` nothing from the date on
stands outside the test set, and nothing before it in test.jsonl.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.dataset.duplicates import twins_in, with_text
from finetune_assets.dataset.formats import FILES, LINEAGE, target_parts
from finetune_assets.dataset.selection import SYNTHETIC
from finetune_assets.dataset.splits import TEST, TRAIN, VALIDATION
from finetune_assets.storage import read_json

MOST = 20
"""Problems of a kind that are listed."""
Settings = dict[str, Any]
_ROW: dict[str, Any] = {
    **{name: LINEAGE[name] for name in ("line", "conversation_id", "message_id", "user", "started_at")},
    **{name: pl.Categorical() for name in ("split", "tenant_id", "vertical", "source", "file", "kind")},
    "text": pl.String,
}


def check_leaks(folder: Path) -> list[str]:
    """What is wrong with a frozen data set, one sentence each; empty: nothing."""
    return examine(folder, read_json(folder / "manifest.json")["settings"])[0]


def check_foreign(folder: Path) -> list[str]:
    """Rows of a tenant or a vertical that the data set's own `select` does not allow, one sentence each."""
    settings: Settings = read_json(folder / "manifest.json")["settings"]
    lineage = pl.concat([pl.read_parquet(folder / name) for name in dict.fromkeys(spec.lineage for spec in FILES)])
    return foreign(lineage, settings)


def examine(folder: Path, settings: Settings) -> tuple[list[str], dict[str, int]]:
    """The problems, at most 20 of a kind, and how many conversations, users, dates and distinct texts were compared.

    `settings` are the data settings, as the manifest holds them.
    """
    problems, rows = _rows(folder)
    for column in ("conversation_id", "user"):
        pairs = rows.select(column, pl.col("split").cast(pl.String)).drop_nulls(column).unique()
        shared = pairs.filter(pl.col(column).is_duplicated()).group_by(column).agg(splits=pl.col("split").sort())
        for value, splits in shared.sort(column).head(MOST).rows():
            problems.append(f"{column} {value} stands in {' and '.join(splits)}")
    dated = _out_of_time(rows, settings["split"])
    synthetic = rows.filter((pl.col("source") == SYNTHETIC) & (pl.col("split") != TRAIN))
    problems += [*dated, *(f"{name} is synthetic" for name in _names(synthetic)), *foreign(rows, settings)]
    threshold = float(settings["filters"]["near_duplicate"])
    texts = rows.select("text", "split", "kind", "file", "line", "message_id")
    train, heldout = texts.filter(pl.col("split") == TRAIN), texts.filter(pl.col("split") != TRAIN)
    examples = heldout.filter(pl.col("kind") == "examples")
    problems += _twins(heldout, train, threshold)
    problems += _twins(examples.filter(pl.col("split") == VALIDATION), examples.filter(pl.col("split") == TEST), threshold)
    compared = {
        "conversations": rows["conversation_id"].n_unique(),
        "users": rows["user"].drop_nulls().n_unique(),
        "texts": rows["text"].n_unique(),
        "tenants": rows["tenant_id"].n_unique(),
    }
    if settings["split"]["mode"] == "time":
        compared["dates"] = rows["started_at"].n_unique()
    return problems, compared


def foreign(rows: pl.DataFrame, settings: Settings) -> list[str]:
    """`rows` has tenant_id and vertical."""
    select, excluded = settings["select"], settings["filters"]["exclude_tenants"]
    if select.get("tenant") is not None:
        own = pl.col("tenant_id") == select["tenant"]
    else:
        own = (pl.col("vertical") == select["vertical"]) & ~pl.col("tenant_id").is_in(excluded)
    strange = rows.filter(~own.fill_null(False)).group_by("tenant_id", "vertical").agg(n=pl.len(), one=pl.col("message_id").min())
    wanted = ", ".join(f"{key}: {value}" for key, value in select.items() if value is not None)
    return [
        f"{n} rows of tenant {tenant} ({vertical}), e.g. {one}, stand in a data set of {wanted}"
        for tenant, vertical, n, one in strange.sort("tenant_id", "vertical").head(MOST).rows()
    ]


def _out_of_time(rows: pl.DataFrame, split: Settings) -> list[str]:
    if split["mode"] != "time":
        return []
    date = datetime.datetime.fromisoformat(split["date"]).replace(tzinfo=datetime.UTC)
    late = pl.col("started_at") >= date
    ahead = rows.filter(late.fill_null(True) & (pl.col("split") != TEST))
    behind = rows.filter(~late.fill_null(False) & (pl.col("split") == TEST) & (pl.col("kind") == "examples"))
    return [
        *(f"{name} starts on or after {split['date']} and is not in test" for name in _names(ahead)),
        *(f"{name} starts before {split['date']} and is in test" for name in _names(behind)),
    ]


def _twins(some: pl.DataFrame, others: pl.DataFrame, threshold: float) -> list[str]:
    found = twins_in(some["text"], others["text"], threshold)
    hits = [int(row) for row in (found >= 0).nonzero()[0][:MOST]]
    mine, theirs = _names(some[hits]), _names(others[[int(found[row]) for row in hits]])
    return [f"{other} is a near-duplicate of {one}" for one, other in zip(mine, theirs, strict=True)]


def _names(rows: pl.DataFrame) -> list[str]:
    return [f"{file}:{line} ({message})" for file, line, message in rows.select("file", "line", "message_id").head(MOST).rows()]


def _rows(folder: Path) -> tuple[list[str], pl.DataFrame]:
    """The lineage of every target with its file, kind and normalised text, and where files and lineage disagree."""
    problems: list[str] = []
    parts = [pl.DataFrame(schema=_ROW)]
    columns = [name for name in LINEAGE if name in _ROW or name == "turn"]
    lineages = {name: pl.read_parquet(folder / name, columns=columns) for name in dict.fromkeys(spec.lineage for spec in FILES)}
    for spec in FILES:
        lineage = lineages[spec.lineage].filter(pl.col("split").is_in(spec.splits)).sort("line", "turn")
        targets = pl.concat(with_text(part, "reply").drop("user_text", "reply") for part in target_parts(folder, spec))
        if not lineage.select("line", "turn").equals(targets.select("line", "turn")):
            lines, known = targets["line"].n_unique(), lineage["line"].n_unique()
            problems.append(
                f"{spec.name} has {lines} lines with {targets.height} targets, "
                f"{spec.lineage} describes {known} with {lineage.height}"
            )
            continue
        rows = lineage.with_columns(targets["text"], file=pl.lit(spec.name), kind=pl.lit(spec.kind))
        parts.append(rows.select(pl.col(name).cast(dtype) for name, dtype in _ROW.items()))
    return problems, pl.concat(parts)
