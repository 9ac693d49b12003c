"""The files of a frozen data set: their names, what they hold, and the lineage that says where each line comes from.

Lines stand in the order of a hash of their text, so a file depends on its content alone, and ids occur only in the lineage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import polars as pl

from finetune_assets.corpus.schema import TIME
from finetune_assets.dataset.splits import SPLITS, TEST, TRAIN, VALIDATION
from finetune_assets.dataset.tool_calls import WRITTEN, as_texts
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
_BLOCK = 2**24  # bytes of a JSONL file that are parsed at a time: bounds what is held to some 100 MB


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
    first = pl.max_horizontal(pl.col("context").list.len().cast(pl.Int64) - turns, 0)
    speaker = pl.col("context").list.get(first).struct.field("role")
    newest = frame.select(pl.col("context").list.slice(first + (speaker != "user").cast(pl.Int64)))
    size = pl.col("context").list.eval(pl.element().struct.field("content").str.len_bytes()).list.sum()  # chars or more
    fits = (size <= chars) & (pl.col("context").list.first().struct.field("role") == "user")
    long = newest.select(~fits.fill_null(False)).to_series().arg_true()
    if long.is_empty():
        return frame.with_columns(newest)
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
    numbered = (
        frame.with_columns(newest)
        .with_row_index("at")
        .join(cut.with_columns(pl.col("at").cast(pl.UInt32)), on="at", how="left", maintain_order="left")
    )
    return numbered.with_columns(context=pl.coalesce("cut", "context")).drop("at", "cut")


def write_files(folder: Path, frames: Mapping[str, Iterable[pl.DataFrame]]) -> None:
    """Writes every JSONL file and lineage; `frames` maps kind to parts of `lines_of`, in order. An empty file is written too."""
    lineages: dict[str, list[pl.DataFrame]] = {}
    for kind, parts in frames.items():
        specs = [spec for spec in FILES if spec.kind == kind]
        told = {spec.name: [pl.DataFrame(schema=LINEAGE)] for spec in specs}
        with ExitStack() as stack:
            files = {
                spec.name: stack.enter_context(stack.enter_context(replacing(folder / spec.name)).open("wb")) for spec in specs
            }
            lines = dict.fromkeys(files, 0)
            for part in parts:
                for spec in specs:
                    rows = part.filter(pl.col("split").is_in(spec.splits))
                    rows.select("jsonl").drop_nulls().write_csv(files[spec.name], include_header=False, quote_style="never")
                    line = pl.col("jsonl").is_not_null().cum_sum().cast(pl.Int64) - 1 + lines[spec.name]
                    numbered = rows.with_columns(line=line).select(pl.col(name).cast(dtype) for name, dtype in LINEAGE.items())
                    lines[spec.name] += int(rows["jsonl"].is_not_null().sum())
                    told[spec.name].append(numbered)
        for spec in specs:
            lineages.setdefault(spec.lineage, []).extend(told[spec.name])
    for name, parts in lineages.items():
        write_parquet(folder / name, pl.concat(parts))


def read_lines(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


_TARGET = {"preferences": "chosen", "kto": "completion"}


def read_targets(folder: Path, spec: FileSpec, lines: int | None = None) -> pl.DataFrame:
    """line, turn, user_text and reply of everything in a file that is trained on or asked for; of its first `lines` alone.

    Targets are the assistant's messages of weight 1; where no message has a weight, the last one.
    """
    return pl.concat(target_parts(folder, spec, lines))


def target_parts(folder: Path, spec: FileSpec, lines: int | None = None) -> Iterator[pl.DataFrame]:
    """The rows of `read_targets` in parts, the first of them empty."""
    empty = pl.DataFrame(schema={"line": pl.Int64, "turn": pl.Int64, "user_text": pl.String, "reply": pl.String})
    yield empty
    done = 0
    for rows in _blocks(folder / spec.name, spec.kind):
        targets = _targets(spec.kind, rows.head(rows.height if lines is None else lines - done))
        yield targets.with_columns(pl.col("line") + done).cast(empty.schema)  # pyright: ignore[reportArgumentType]
        done += rows.height
        if lines is not None and done >= lines:
            break


def _blocks(path: Path, kind: str) -> Iterator[pl.DataFrame]:
    """The contents and weights of a file's messages, some thousands of rows at a time. pyarrow parses JSON twice as fast as
    Polars does; its import takes 0.2 s."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.json  # noqa: PLC0415

    messages = pa.list_(pa.struct([("content", pa.string()), ("weight", pa.int8())]))
    schema = {
        "examples": pa.schema([("messages", messages)]),
        "preferences": pa.schema([("prompt", messages), ("chosen", messages)]),
        "kto": pa.schema([("prompt", messages), ("completion", messages)]),
    }
    options = pyarrow.json.ParseOptions(explicit_schema=schema[kind], unexpected_field_behavior="ignore")
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            block += file.readline()
            if WRITTEN in block:
                block = b"".join(_as_texts(line) for line in block.splitlines(keepends=True))
            whole = pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
            read = pyarrow.json.read_json(pa.BufferReader(block), read_options=whole, parse_options=options)
            yield cast("pl.DataFrame", pl.from_arrow(read))


def _as_texts(line: bytes) -> bytes:
    """A line with texts in the place of tool calls and of their results; one without them as it is."""
    return json.dumps(as_texts(json.loads(line))).encode() + b"\n" if WRITTEN in line else line


def _targets(kind: str, rows: pl.DataFrame) -> pl.DataFrame:
    rows = rows.with_row_index("line")
    if kind != "examples":
        said = pl.col(_TARGET[kind]).list.first().struct.field("content")
        asked = pl.col("prompt").list.last().struct.field("content")
        return rows.select("line", turn=pl.col("prompt").list.len(), user_text=asked, reply=said)
    messages, content = pl.col("messages"), pl.element().struct.field("content")
    has_weight = messages.list.eval(pl.element().struct.field("weight").is_not_null()).list.any()
    contents = messages.list.eval(content).list
    last = rows.filter(~has_weight).select(
        "line", turn=messages.list.len() - 1, user_text=contents.get(-2, null_on_oob=True), reply=contents.last()
    )
    flat = rows.filter(has_weight).explode("messages").unnest("messages")
    flat = flat.with_columns(turn=pl.int_range(pl.len()).over("line"), user_text=pl.col("content").shift(1).over("line"))
    many = flat.filter(pl.col("weight") == 1).select("line", "turn", "user_text", reply="content")
    types = {"line": pl.Int64, "turn": pl.Int64}
    return pl.concat([last.cast(types), many.cast(types)]).sort("line", "turn")  # pyright: ignore[reportArgumentType]


def read_frames(folder: Path) -> dict[str, pl.DataFrame]:
    """Kind to the rows of a frozen data set as `lines.lines_of` makes them: the lineage, `digest` of the line, and `jsonl`.

    A line with several targets has as many rows; all but the first have no `jsonl`. `write_files` writes them again.
    """
    frames: dict[str, list[pl.DataFrame]] = {}
    for spec in FILES:
        lines = (folder / spec.name).read_text(encoding="utf-8").split("\n")[:-1]
        lineage = pl.read_parquet(folder / spec.lineage).filter(pl.col("split").is_in(spec.splits)).sort("line", "turn")
        texts = pl.DataFrame({"line": range(len(lines)), "jsonl": lines}, schema={"line": pl.Int64, "jsonl": pl.String})
        texts = texts.with_columns(digest=digests(texts["jsonl"]))
        rows = lineage.join(texts, on="line", how="left", maintain_order="left")
        first = pl.col("line").is_first_distinct()
        frames.setdefault(spec.kind, []).append(rows.with_columns(jsonl=pl.when(first).then("jsonl")))
    return {kind: pl.concat(parts) for kind, parts in frames.items()}


def digests(lines: pl.Series) -> pl.Series:
    """The hash that orders lines and stands for them in the fingerprint."""
    return pl.Series([digest(line) for line in lines.cast(pl.Binary)], dtype=pl.String)


def digest(line: bytes) -> str:
    """That of one line, in UTF-8."""
    return hashlib.blake2b(line, digest_size=16).hexdigest()
