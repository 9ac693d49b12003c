"""Messages of live conversations that call tools, or answer such a call, as the texts that the corpus has for them.

A platform's row says it in two optional columns: `tool_calls` of an assistant's message (JSON, as OpenAI's API has it), and
`tool_name` of a message of the role `tool`. They become the texts of `forms`, as in imported files: every rule for texts
(personal data, lengths, near-duplicates) holds for them, and a line of a data set has messages of the role `tool` again.
"""

from __future__ import annotations

import json
import re

import polars as pl

from finetune_assets.corpus.forms import Unusable, calls_of, calls_text, result_text

TOOL_ROLES = ("tool", "function")
_NO_CALLS = ("", "[]", "{}", "null")
_BROKEN = re.compile("[\x00\ufffd]")


def with_tools(frame: pl.DataFrame, raw: pl.DataFrame) -> pl.DataFrame:
    """Typed messages whose role, content and problem say what `raw` says of tools; without tools the frame itself."""
    roles = [role for role in frame["role"].unique() if role is not None]
    answers = [role for role in roles if role.strip().lower() in TOOL_ROLES]
    if not answers and "tool_calls" not in raw.columns:
        return frame
    named = _texts(raw, "tool_name").alias("_tool")
    calls = _texts(raw, "tool_calls").str.strip_chars().alias("_calls")
    speaker = pl.col("role").str.strip_chars().str.to_lowercase()
    found = frame.with_columns(named, calls).with_row_index("_row")
    answered = found.filter(pl.col("role").is_in(answers))
    called = found.filter((speaker == "assistant") & pl.col("_calls").is_not_null() & ~pl.col("_calls").is_in(_NO_CALLS))
    made = [(row, "user", _answer(name, text), problem) for row, name, text, problem in _rows(answered, "_tool")]
    for row, said, text, problem in _rows(called, "_calls"):
        content, wrong = _call(str(said), text)
        made.append((row, "assistant", content, problem or wrong))
    if not made:
        return frame
    new = {"role": "_role", "content": "_content", "problem": "_problem"}
    schema = {"_row": found.schema["_row"], **dict.fromkeys(new.values(), pl.String)}
    joined = found.join(pl.DataFrame(made, schema=schema, orient="row"), on="_row", how="left", maintain_order="left")
    changed = pl.col("_role").is_not_null()
    return joined.with_columns(
        pl.when(changed).then(after).otherwise(before).alias(before) for before, after in new.items()
    ).select(frame.columns)


def _rows(frame: pl.DataFrame, column: str) -> list[tuple[int, str | None, str | None, str | None]]:
    return frame.select("_row", column, "content", "problem").rows()


def _answer(name: str | None, content: str | None) -> str | None:
    """The text of a tool's answer; what is empty or broken stays as it is, so that its own rule names it."""
    if content is None or not content.strip() or _BROKEN.search(content):
        return content
    return _whole(result_text((name or "").strip(), content.strip()))


def _call(calls: str, content: str | None) -> tuple[str | None, str | None]:
    """The text of a reply that calls tools, and what is wrong with it."""
    if content is not None and _BROKEN.search(content):
        return content, None
    try:
        text = calls_text(calls_of(calls), (content or "").strip())
    except Unusable as unusable:
        return content, str(unusable)
    except RecursionError:
        return content, "tool_call_invalid: its tool calls are nested too deeply"
    return (content, "tool_call_invalid: its tool calls hold NUL") if "\\u0000" in text else (_whole(text), None)


def _whole(text: str) -> str:
    """Without lone surrogates, which no file can hold: they become U+FFFD, and the row is set aside as broken."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _texts(raw: pl.DataFrame, name: str) -> pl.Series:
    """A column as texts; lists and records as JSON."""
    if name not in raw.columns:
        return pl.Series(name, [None] * raw.height, pl.String)
    cells = raw[name]
    if cells.dtype == pl.Binary:
        return pl.Series(name, [None if cell is None else cell.decode("utf-8", "replace") for cell in cells], pl.String)
    if cells.dtype.is_nested():
        found = [None if cell is None else json.dumps(cell, ensure_ascii=False, default=str) for cell in cells.to_list()]
        return pl.Series(name, found, pl.String)
    return cells.cast(pl.String, strict=False)
