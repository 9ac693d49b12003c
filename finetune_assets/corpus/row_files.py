"""Rows of fine-tuning files: JSON lines, JSON, CSV and Parquet, one by one with their line."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import polars as pl

from finetune_assets.corpus.files import check_separator
from finetune_assets.corpus.forms import Unusable
from finetune_assets.errors import SourceError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_OTHER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_NO_UTF8 = re.compile("[\udc80-\udcff]")  # how `surrogateescape` hands on the bytes 0x80 to 0xFF


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or row number from 1 on, row) of a file; a line that is no JSON or not UTF-8 comes as an Unusable.
    Raises SourceError."""
    if path.suffix.lower() not in SUFFIXES:
        raise SourceError(f"{path} is of no known kind; supported are {', '.join(SUFFIXES)}.")
    try:
        yield from _READERS[path.suffix.lower()](path)
    except OSError as error:
        cause = error.strerror or type(error).__name__
        raise SourceError(f"{path} cannot be read: {cause}. Check that it exists and that this user may read it.") from None


def _text(path: Path, newline: str | None = None) -> TextIO:
    """A text file, its bytes that are not UTF-8 as surrogates. Raises SourceError where it is UTF-16 or UTF-32 by its mark."""
    with path.open("rb") as file:
        head = file.read(4)
    other = next((name for mark, name in _OTHER_MARKS.items() if head.startswith(mark)), None)
    if other:
        raise SourceError(f"{path} is {other}; save it as UTF-8.")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _not_utf8(text: str) -> Unusable | None:
    byte = _NO_UTF8.search(text)
    return byte and Unusable(
        "text_broken",
        f"byte 0x{ord(byte[0]) - 0xDC00:X} is not UTF-8 (a file of Latin-1 or Windows-1252?); save the file as UTF-8",
    )


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _text(path, "\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _not_utf8(line) or _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return Unusable("json_invalid", f"{type(error).__name__}{where}")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    with _text(path) as file:
        text = file.read()
    value = _parsed(text)
    if not isinstance(value, list):
        raise SourceError(f"{path} is no JSON list of rows. Give a list of objects, or one object a line as .jsonl.")
    utf8 = _not_utf8(text) is None  # then a surrogate in a row is an escape of its JSON
    for number, row in enumerate(cast("list[Any]", value), start=1):
        yield number, row if utf8 else _not_utf8(json.dumps(row, ensure_ascii=False)) or row


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with _text(path, "") as file:
        reader = csv.DictReader(file)
        try:
            check_separator(path, reader.fieldnames or ())
            for row in reader:
                if None in row or None in row.values():
                    yield reader.line_num, Unusable("not_an_object", "it has another number of fields than the header")
                else:
                    yield reader.line_num, _not_utf8("".join(row.values())) or row
        except csv.Error as error:
            raise SourceError(f"{path}:{reader.line_num} is no well-formed CSV ({error}). Export it again.") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        frame = pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise SourceError(f"{path} is a damaged Parquet file ({type(error).__name__}). Copy or export it again.") from None
    yield from enumerate(frame.iter_rows(named=True), start=1)


_READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
