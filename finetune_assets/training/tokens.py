"""A data set as token ids, made once: the plan counts them, the training reads them.

`token_rows` keeps what it made under a hash of file, model and length, so a row is tokenised once however often it is planned,
trained or resumed. The kinds:

    chat          {"messages", "tools"?}                       input_ids, labels (-100 where the token is no target)
    text          a folder of .txt and .md files               input_ids, labels: windows of whole documents, every token a target
    preferences   {"prompt", "chosen", "rejected", "tools"?}   prompt_ids, chosen_ids, rejected_ids
    kto           {"prompt", "completion", "label"}            prompt_ids, completion_ids, label
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from finetune_assets.errors import DataError
from finetune_assets.storage import read_json, replacing_folder, write_json, write_parquet
from finetune_assets.training.encoding import Message, Renderer, encode_example, encode_row

Kind = Literal["chat", "text", "preferences", "kto"]
Row = dict[str, Any]

VERSION = 1
"""Raise it when the same row would give other ids."""

IGNORED = -100
"""Label of a token that is no target (torch.nn.CrossEntropyLoss)."""

TEXT_FILES = (".txt", ".md")


@dataclass(frozen=True)
class Rows:
    """Tokenised examples and what became of those that were too long."""

    examples: list[Row] = field(default_factory=list[Row])
    """Columns of the kind."""
    shortened: int = 0
    """Examples that lost turns, or the beginning of their prompt, to fit."""
    dropped: int = 0
    """Examples whose reply leaves no room for a prompt."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of the longest sequence of each example."""
        return [_length(example) for example in self.examples]

    @property
    def tokens(self) -> int:
        """All tokens that the model reads in one epoch, prompts included; of a preference pair both sides."""
        return sum(_tokens(example) for example in self.examples)


def _length(example: Row) -> int:
    if "input_ids" in example:
        return len(example["input_ids"])
    ends = [len(example[name]) for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in example]
    return len(example["prompt_ids"]) + max(ends)


def _tokens(example: Row) -> int:
    if "input_ids" in example:
        return len(example["input_ids"])
    ends = [len(example[name]) for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in example]
    return len(example["prompt_ids"]) * len(ends) + sum(ends)


def token_rows(
    renderer: Callable[[], Renderer],
    source: tuple[Kind, Path],
    model: dict[str, str],
    max_length: int,
    cache: Path | None = None,
) -> Rows:
    """The rows of a file (of a folder for `text`); a missing one has none. `model`: the base model's identity.

    `renderer` is called only where the rows are not in the cache. Raises DataError for a line that is no row of its kind, and for
    a folder without text or with a file in another encoding than UTF-8.
    """
    kind, path = source
    if not path.exists():
        return Rows()
    if cache is None:
        return _make(renderer(), kind, path, max_length)
    what = {"version": VERSION, "kind": kind, "content": content_hash(path), "model": model, "max_length": max_length}
    folder = cache / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    if (folder / "counts.json").exists():
        counts = read_json(folder / "counts.json")
        return Rows(pl.read_parquet(folder / "rows.parquet").to_dicts(), counts["shortened"], counts["dropped"])
    rows = _make(renderer(), kind, path, max_length)
    with replacing_folder(folder) as draft:
        write_parquet(draft / "rows.parquet", pl.DataFrame(rows.examples))
        write_json(draft / "counts.json", {"shortened": rows.shortened, "dropped": rows.dropped, **what})
    return rows


def content_hash(path: Path) -> str:
    """sha256 of a file, or of a text folder's files by name and content."""
    digest = hashlib.sha256()
    for file in text_files(path) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            digest.update(
                f"{file.relative_to(path) if path.is_dir() else ''}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}".encode()
            )
    return digest.hexdigest()


def text_files(folder: Path) -> list[Path]:
    """The plain-text files below a folder, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix in TEXT_FILES and file.is_file())


def _make(renderer: Renderer, kind: Kind, path: Path, max_length: int) -> Rows:
    if kind == "text":
        windows = list(_windows(renderer, path, max_length))
        if not windows:
            raise DataError(f"The {' and '.join(TEXT_FILES)} files in {path} hold no text. Write the domain's own into them.")
        return Rows(windows)
    encode = {"chat": _chat, "preferences": _preference, "kto": _kto}[kind]
    examples: list[Row] = []
    shortened = dropped = 0
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                made = encode(renderer, json.loads(line), max_length)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: no row of `{kind}` ({error!r}). Materialise jsonl_splits again."
                ) from None
            for example, turns in made:
                if example is None:
                    dropped += 1
                    continue
                examples.append(example)
                shortened += turns > 0 or _length(example) == max_length
    return Rows(examples, shortened, dropped)


Made = list[tuple[Row | None, int]]
"""Examples of a row (None: does not fit) and the turns that each lost."""


def _chat(renderer: Renderer, row: Row, max_length: int) -> Made:
    made: Made = []
    for ids, mask, turns in encode_row(renderer, row["messages"], max_length, row.get("tools")):
        labels = [token if target else IGNORED for token, target in zip(ids, mask, strict=True)]
        made.append(({"input_ids": ids, "labels": labels} if len(ids) <= max_length else None, turns))
    return made


def _preference(renderer: Renderer, row: Row, max_length: int) -> Made:
    """Both replies after the same prompt, which is as long as the longer reply allows."""
    prompt, tools = row["prompt"], row.get("tools")
    sides = [_sides(renderer, [*prompt, *row[name]], max_length, tools) for name in ("chosen", "rejected")]
    longest = max(range(2), key=lambda side: len(sides[side][1]))
    ids, turns = sides[longest][0], sides[longest][2]
    if not ids:
        return [(None, turns)]
    return [({"prompt_ids": ids, "chosen_ids": sides[0][1], "rejected_ids": sides[1][1]}, turns)]


def _kto(renderer: Renderer, row: Row, max_length: int) -> Made:
    prompt, completion, turns = _sides(renderer, [*row["prompt"], *row["completion"]], max_length, row.get("tools"))
    if not prompt:
        return [(None, turns)]
    return [({"prompt_ids": prompt, "completion_ids": completion, "label": bool(row["label"])}, turns)]


def _sides(renderer: Renderer, messages: Sequence[Message], max_length: int, tools: Any) -> tuple[list[int], list[int], int]:
    """Ids of the prompt (none: it does not fit) and of the last reply, and the turns dropped."""
    ids, mask, turns = encode_example(renderer, messages, max_length, tools)
    start = len(mask) - sum(mask)
    return (ids[:start] if len(ids) <= max_length else []), ids[start:], turns


def _windows(renderer: Renderer, folder: Path, max_length: int) -> Iterator[Row]:
    """Each document and its end token, cut into windows of `max_length` tokens; a window never holds two documents."""
    end = renderer.encode(renderer.eos_token)
    for file in text_files(folder):
        try:
            text = file.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is no UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. Save it as UTF-8 (from an old "
                "Windows: `iconv -f WINDOWS-1252 -t UTF-8`), or take it out of the folder."
            ) from None
        for special in renderer.special_texts:
            text = text.replace(special, "") if special else text
        ids = renderer.encode(text) + end if text else []
        for start in range(0, len(ids), max_length):
            window = ids[start : start + max_length]
            if len(window) > 1:  # a single token has nothing to be predicted from
                yield {"input_ids": window, "labels": [IGNORED, *window[1:]]}
