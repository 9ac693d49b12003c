"""Reads the cells of a source's columns as their declared types and never fails: a cell that makes no sense gets a `problem`.

`typed(frame, "messages")` has every declared column in its type, and for times, scores and flags a column `<name>_problem`:
null, or `naive`, `invalid`, `absurd` (times), `invalid`, `out_of_range` (scores), `invalid` (flags). Where there is a problem
the value is null.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache

import polars as pl

from finetune_assets.corpus.schema import SOURCE, TIME
from finetune_assets.corpus.tool_rows import with_tools

EARLIEST, LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
"""Times outside [EARLIEST, LATEST) are absurd: clocks that were never set, seconds read as milliseconds."""

NO_TEXT = "\x00"
"""What a list, a record or undecodable bytes become in a text column; validation takes it for broken text."""

_ISO = r"^(\d{4}-\d{2}-\d{2})[T ](\d{2}:\d{2})(:\d{2})?(?:[.,](\d{1,9}))?[ ]?(Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?(?::00)?)?$"
_BARE_DATE = r"^\d{4}-\d{2}-\d{2}$"
_TRUE, _FALSE = ["true", "t", "1", "yes", "y", "si", "sí", "sim"], ["false", "f", "0", "no", "n", "não", "nao"]


def typed(frame: pl.DataFrame, table: str) -> pl.DataFrame:
    """The declared columns of `table` in their types, with their `_problem` columns; an absent optional column is null."""
    columns: list[pl.Series] = []
    for name, column in SOURCE[table].items():
        if column.kind == "aside":
            continue
        raw = frame[name] if name in frame.columns else pl.Series(name, [None] * len(frame), pl.String)
        if column.kind == "text":
            columns.append(text(raw).alias(name))
        else:
            value, problem = _READERS[column.kind](raw)
            columns += [value.alias(name), problem.alias(f"{name}_problem")]
    made = pl.DataFrame(columns)
    return with_tools(made, frame) if table == "messages" else made


@cache
def no_rows(table: str) -> pl.DataFrame:
    """None, with the columns of `typed`."""
    return typed(pl.DataFrame(), table)


def text(raw: pl.Series) -> pl.Series:
    """Any column as text; whole numbers lose their `.0`, what is no text becomes NO_TEXT."""
    if raw.dtype == pl.String:
        return raw
    if raw.dtype.is_float():
        whole = (raw == raw.floor()) & (raw.abs() < 2**53)
        digits = raw.fill_nan(None).cast(pl.Int64, strict=False).cast(pl.String)
        return digits.zip_with(whole.fill_null(False), raw.fill_nan(None).cast(pl.String))
    if raw.dtype.is_numeric() or any(raw.dtype == plain for plain in (pl.Null, pl.Boolean, pl.Categorical, pl.Enum)):
        return raw.cast(pl.String)
    if raw.dtype == pl.Binary:
        return pl.Series(raw.name, [None if cell is None else cell.decode("utf-8", "replace") for cell in raw], pl.String)
    if raw.dtype.is_temporal():
        return raw.cast(pl.String, strict=False)
    return _no_text(raw)


def _no_text(raw: pl.Series) -> pl.Series:
    return pl.select(pl.when(raw.is_not_null()).then(pl.lit(NO_TEXT)))["literal"]


def _time(raw: pl.Series) -> tuple[pl.Series, pl.Series]:
    """ISO 8601 with an offset, or a timestamp column with a zone, as microseconds UTC."""
    if isinstance(raw.dtype, pl.Datetime) and raw.dtype.time_zone is not None:
        value = raw.dt.convert_time_zone("UTC").cast(TIME, strict=False)
        naive = pl.repeat(False, len(raw), dtype=pl.Boolean, eager=True)
    elif isinstance(raw.dtype, pl.Datetime | pl.Date):
        value = pl.repeat(None, len(raw), dtype=TIME, eager=True)
        naive = raw.is_not_null()
    else:
        raw = text(raw).str.strip_chars().replace("", None)
        value, naive = _parsed(raw)
    frame = pl.DataFrame({"raw": raw.is_not_null(), "value": value, "naive": naive})
    absurd = (pl.col("value") < EARLIEST) | (pl.col("value") >= LATEST)
    frame = frame.select(
        pl.when(~absurd).then("value").alias("value"),
        pl.when(~pl.col("raw"))
        .then(None)
        .when("naive")
        .then(pl.lit("naive"))
        .when(pl.col("value").is_null())
        .then(pl.lit("invalid"))
        .when(absurd)
        .then(pl.lit("absurd"))
        .alias("problem"),
    )
    return frame["value"], frame["problem"].cast(pl.String)


def _parsed(texts: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Times of ISO texts, and which of the texts have no offset."""
    part = pl.col("text").str.extract
    offset = part(_ISO, 5)
    digits = offset.str.replace_all(":", "", literal=True).str.slice(1)
    hours, minutes = digits.str.slice(0, 2), digits.str.slice(2, 2)
    zone = pl.when(offset.is_in(["Z", "UTC", "GMT"])).then(pl.lit("+00:00")).otherwise(
        offset.str.slice(0, 1) + hours + ":" + pl.when(minutes == "").then(pl.lit("00")).otherwise(minutes)
    )  # fmt: skip
    fraction = part(_ISO, 4).fill_null("").str.pad_end(6, "0").str.slice(0, 6)
    clock = part(_ISO, 1) + "T" + part(_ISO, 2) + part(_ISO, 3).fill_null(":00") + "." + fraction + zone
    bare = (part(_ISO, 1).is_not_null() & offset.is_null()) | pl.col("text").str.contains(_BARE_DATE)
    frame = pl.DataFrame({"text": texts}).select(
        clock.str.to_datetime("%Y-%m-%dT%H:%M:%S%.6f%:z", time_unit="us", strict=False).cast(TIME).alias("value"),
        bare.fill_null(False).alias("naive"),
    )
    return frame["value"], frame["naive"]


def _score(raw: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Whole numbers 1..5; a missing one (null, NaN, empty) is no problem."""
    number = text(raw).str.strip_chars().replace("", None)
    frame = pl.DataFrame({"given": number.is_not_null(), "number": number.cast(pl.Float64, strict=False)})
    fits = pl.col("number").is_in([1.0, 2.0, 3.0, 4.0, 5.0])
    frame = frame.select(
        pl.when(fits).then("number").cast(pl.Int8, strict=False).alias("value"),
        pl.when(~pl.col("given") | pl.col("number").is_nan())
        .then(None)
        .when(pl.col("number").is_null())
        .then(pl.lit("invalid"))
        .when(~fits)
        .then(pl.lit("out_of_range"))
        .alias("problem"),
    )
    return frame["value"], frame["problem"].cast(pl.String)


def _flag(raw: pl.Series) -> tuple[pl.Series, pl.Series]:
    word = text(raw).str.strip_chars().str.to_lowercase().str.strip_suffix(".0").replace("", None)
    value = pl.select(pl.when(word.is_in(_TRUE)).then(True).when(word.is_in(_FALSE)).then(False).alias("value"))["value"]
    problem = pl.select(pl.when(word.is_not_null() & value.is_null()).then(pl.lit("invalid")).alias("problem"))["problem"]
    return value.cast(pl.Boolean), problem.cast(pl.String)


_READERS: dict[str, Callable[[pl.Series], tuple[pl.Series, pl.Series]]] = {"time": _time, "score": _score, "flag": _flag}
