"""Examples as lines of JSON, made column by column: each text is escaped once and lines are put together from pieces.

    examples, per_reply          {"messages": [system?, user, …, assistant]}: the target is the last message
    examples, per_conversation   the same with `"weight": 0 | 1` on each assistant message: 1 is a target
    preferences                  {"prompt": […], "chosen": [assistant], "rejected": [assistant]}     TRL conversational
    kto                          {"prompt": […], "completion": [assistant], "label": true | false}   TRL conversational

With the setting `tools` each line has them as `"tools"`. Rows that call a tool have the messages of `tool_calls`, and always
one line a reply.

`per_conversation` holds the same (context, target) pairs as `per_reply`, in fewer rows: a reply goes on with the row of the
reply before it if, and only if, that row so far is the beginning of its own context. So a row ends at a corrected reply (what
was said next answered the original, which stands in the context of the rows that follow), where the context has lost its oldest
turns to `context_turns` or `context_chars`, and at the first of several messages in a row. Synthetic rows stand alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from finetune_assets.assistants.settings.data import Layout
from finetune_assets.corpus.forms import CALLS
from finetune_assets.corpus.spool import Spool
from finetune_assets.dataset import tool_calls
from finetune_assets.dataset.formats import digests
from finetune_assets.dataset.selection import SYNTHETIC
from finetune_assets.dataset.splits import TEST, TRAIN

_ESCAPES = {
    **{chr(code): f"\\u{code:04x}" for code in range(0x20)},
    **{"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"},
    **{"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"},  # line ends to some readers
}
COLUMNS = {"examples": ("reply",), "preferences": ("chosen", "rejected"), "kto": ("completion",)}
"""Texts of a line beside its context."""
_REPLY = '{"role":"assistant","content":"'
_TRAINED, _UNTRAINED = ',"weight":1', ',"weight":0'
AT_ONCE = 50_000
_HELD = ("context", "user_text", "reply", "chosen", "rejected", "completion", "text_key", "place")
"""Columns that a line holds, or that it does not need: no use beside it."""


def escaped(text: pl.Expr) -> pl.Expr:
    """The inside of a JSON string: what `json.dumps(…, ensure_ascii=False)` writes, in one line to every reader."""
    return text.str.replace_many(list(_ESCAPES), list(_ESCAPES.values()))


Tools = Sequence[dict[str, Any]]


def lines_of(kind: str, frame: pl.DataFrame, system: str, layout: Layout = "per_reply", tools: Tools = ()) -> pl.DataFrame:
    """One row a target, in the order of the files, with three columns more.

    `digest` of its line; `jsonl`, the line, for the first target of a line (null for the others); `turn`, its place among the
    line's messages (preferences and kto: after the prompt). Lines stand in the order of their digests.
    The test set is always `per_reply`: a benchmark asks for one reply at a time.
    """
    return in_order(lines_made(kind, frame, system, layout, tools))


def lines_made(kind: str, frame: pl.DataFrame, system: str, layout: Layout = "per_reply", tools: Tools = ()) -> pl.DataFrame:
    """The same in any order, for `in_order`; all of a conversation's rows must be there."""
    if kind == "examples" and layout == "per_conversation":
        alone = (pl.col("split") == TEST) | _calls()
        parts = [_per_conversation(frame.filter(~alone), system, tools), _single(kind, frame.filter(alone), system, tools)]
        return pl.concat(parts)
    return _single(kind, frame, system, tools)


class Sorted:
    """Lines that are made in parts, in the order of the files: by the first digit of their digests in memory up to a limit of
    bytes, the rest in a temporary file without a name. All else of a row is held."""

    def __init__(self, limit: int) -> None:
        self._spool = Spool(limit)
        self._rows: dict[str, list[pl.DataFrame]] = {}

    def add(self, made: pl.DataFrame) -> None:
        """Some rows of `lines_made`."""
        for (digit,), rows in made.group_by(pl.col("digest").str.head(1)):
            if digit not in self._rows:
                self._rows[digit] = []
                self._spool.start(digit)
            self._rows[digit].append(rows.drop("jsonl"))
            self._spool.add(digit, rows.select("jsonl"))

    @property
    def marks(self) -> pl.DataFrame:
        """split, source and digest of all rows."""
        return pl.concat(rows.select("split", "source", "digest") for parts in self._rows.values() for rows in parts)

    def __iter__(self) -> Iterator[pl.DataFrame]:
        """Once: what was given is no longer held."""
        for digit in sorted(self._rows):
            lines = pl.concat(self._spool.frames(digit))
            yield in_order(pl.concat(self._rows.pop(digit)).hstack(lines))
            self._spool.drop(digit)


def _calls() -> pl.Expr:
    """Whether the context or the reply calls a tool."""
    before = pl.col("context").list.eval(pl.element().struct.field("content").str.contains(CALLS, literal=True)).list.any()
    return before | pl.col("reply").str.starts_with(CALLS)


def in_order(made: pl.DataFrame) -> pl.DataFrame:
    """Rows of `lines_made` as `lines_of` gives them."""
    return made.sort("digest", "split", "group", "turn").drop("group")


def _single(kind: str, frame: pl.DataFrame, system: str, tools: Tools) -> pl.DataFrame:
    """One line a row; `group` is the message id."""
    jsonl = texts_of(kind, frame, system)
    made = frame.with_columns(
        jsonl.alias("jsonl"), turn=pl.col("context").list.len().cast(pl.Int64) + bool(system), group="message_id"
    )
    calling = jsonl.str.contains(tool_calls.IN_LINE, literal=True)
    if calling.any():
        rows = frame.with_row_index("row").filter(calling)
        called = [(row["row"], *_calling(kind, row, system)) for row in rows.iter_rows(named=True)]
        lines = pl.DataFrame(called, schema={"row": pl.UInt32, "line": pl.String, "at": pl.Int64}, orient="row")
        made = made.with_row_index("row").join(lines, on="row", how="left", maintain_order="left")
        made = made.with_columns(jsonl=pl.coalesce("line", "jsonl"), turn=pl.coalesce("at", "turn")).drop("row", "line", "at")
    if tools:
        made = made.with_columns(jsonl=_with_tools(pl.col("jsonl"), tools))
    order = [name for name in frame.columns if name not in _HELD]
    return made.with_columns(digest=digests(made["jsonl"])).select(*order, "jsonl", "digest", "turn", "group")


def _calling(kind: str, row: dict[str, Any], system: str) -> tuple[str, int]:
    """The line of a row that calls tools, and how many messages stand before its reply."""
    context = [(turn["role"], turn["content"]) for turn in row["context"]]
    before = tool_calls.messages_of(context)
    prompt = [*([{"role": "system", "content": system}] if system else []), *before]
    said: dict[str, list[tool_calls.Message]] = {}
    for name in COLUMNS[kind]:
        more = tool_calls.messages_of([*context, ("assistant", row[name])])[len(before) :]
        said[name] = more if len(more) == 1 else [{"role": "assistant", "content": row[name]}]
    if kind == "examples":
        return _json({"messages": [*prompt, *said["reply"]]}), len(prompt)
    return _json({"prompt": prompt, **said, **({"label": row["label"]} if kind == "kto" else {})}), len(prompt)


def _with_tools(lines: pl.Expr, tools: Tools) -> pl.Expr:
    return pl.concat_str(lines.str.strip_suffix("}"), pl.lit(f',"tools":{_json(list(tools))}}}'))


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for end in ("\u2028", "\u2029", "\x85"):
        text = text.replace(end, _ESCAPES[end])
    return text


def texts_of(kind: str, frame: pl.DataFrame, system: str) -> pl.Series:
    """One line for each row, in the order of the rows; 50,000 at a time, which bounds what is held beside the lines."""
    parts = [_texts(kind, frame.slice(first, AT_ONCE), system) for first in range(0, max(frame.height, 1), AT_ONCE)]
    return pl.concat(parts)


def _texts(kind: str, frame: pl.DataFrame, system: str) -> pl.Series:
    prompt = pl.concat_str(pl.lit(_system(system)), turns())
    said = {name: pl.concat_str(pl.lit(_REPLY), escaped(pl.col(name)), pl.lit('"}')) for name in COLUMNS[kind]}
    if kind == "examples":
        made = pl.concat_str(pl.lit('{"messages":['), prompt, pl.lit(","), said["reply"], pl.lit("]}"))
    elif kind == "preferences":
        parts = (pl.lit('],"chosen":['), said["chosen"], pl.lit('],"rejected":['), said["rejected"], pl.lit("]}"))
        made = pl.concat_str(pl.lit('{"prompt":['), prompt, *parts)
    else:
        label = pl.when("label").then(pl.lit("true")).otherwise(pl.lit("false"))
        parts = (pl.lit('],"completion":['), said["completion"], pl.lit('],"label":'), label, pl.lit("}"))
        made = pl.concat_str(pl.lit('{"prompt":['), prompt, *parts)
    return frame.select(jsonl=made).to_series()


def _system(system: str) -> str:
    return f'{{"role":"system","content":"{pl.select(escaped(pl.lit(system))).item()}"}},' if system else ""


def turns(weight: str = "") -> pl.Expr:
    """The messages of `context` as JSON, joined by commas; `weight` is added to each of the assistant's."""
    role, content = pl.element().struct.field("role"), pl.element().struct.field("content")
    end = pl.when(role == "assistant").then(pl.lit(f'"{weight}}}')).otherwise(pl.lit('"}')) if weight else pl.lit('"}')
    message = pl.concat_str(pl.lit('{"role":"'), role, pl.lit('","content":"'), escaped(content), end)
    return pl.col("context").list.eval(message).list.join(",")


def _stitched(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows by conversation, with `goes_on`: continues the line of the row before."""
    alone = pl.when((pl.col("source") == SYNTHETIC) | _calls()).then(pl.int_range(pl.len())).otherwise(-1)
    rows = frame.with_columns(alone=alone, size=pl.col("context").list.len()).sort(
        "conversation_id", "split", "alone", "size", "created_at", "message_id"
    )
    role, content = pl.element().struct.field("role"), pl.element().struct.field("content")
    rows = rows.with_columns(_told=pl.col("context").list.eval(pl.concat_str(role, pl.lit("\x00"), content)).list.join("\x01"))
    so_far = pl.concat_str("_told", pl.lit("\x01assistant\x00"), "reply", pl.lit("\x01"))
    same = ~pl.struct("conversation_id", "split", "alone").is_first_distinct()
    rows = rows.with_columns(goes_on=same & pl.col("_told").str.starts_with(so_far.shift(1)).fill_null(False))
    return rows.drop("_told")


@dataclass
class LayoutNote:
    """Training rows and characters of text of both layouts, added up over parts of whole conversations."""

    system: str
    rows: int = 0
    characters: int = 0
    lines: int = 0
    shorter: int = 0

    def add(self, kept: pl.DataFrame) -> None:
        """Some kept examples with their contexts."""
        rows = kept.filter(pl.col("split") == TRAIN)
        if rows.is_empty():
            return
        chars = (
            pl.col("context").list.eval(pl.element().struct.field("content").str.len_chars()).list.sum()
            + pl.col("reply").str.len_chars()
        )
        rows = _stitched(rows).with_columns(chars=chars.cast(pl.Int64))
        more = pl.when("goes_on").then(pl.col("chars") - pl.col("chars").shift(1)).otherwise(pl.col("chars") + len(self.system))
        self.rows += rows.height
        self.characters += int(rows["chars"].sum()) + rows.height * len(self.system)
        self.lines += int((~rows["goes_on"]).sum())
        self.shorter += int(rows.select(more.sum()).item())

    def told(self) -> dict[str, Any]:
        """Both layouts, and the share of characters that `per_conversation` saves."""
        if not self.rows:
            return {}
        return {
            "per_reply": {"rows": self.rows, "characters": self.characters},
            "per_conversation": {"rows": self.lines, "characters": self.shorter},
            "saved_by_per_conversation": round(1 - self.shorter / max(self.characters, 1), 4),
        }


def _per_conversation(frame: pl.DataFrame, system: str, tools: Tools) -> pl.DataFrame:
    """`group` is the message id of the line's first target."""
    if frame.is_empty():
        return _single("examples", frame, system, tools)
    rows = _stitched(frame).with_columns(before=turns(_UNTRAINED), said=escaped(pl.col("reply")))
    so_far = pl.concat_str("before", pl.lit(f",{_REPLY}"), "said", pl.lit(f'"{_UNTRAINED}}},'))
    rows = rows.with_columns(previous=so_far.shift(1))
    new = pl.when("goes_on").then(pl.col("before").str.strip_prefix(pl.col("previous"))).otherwise("before")
    piece = pl.concat_str(new, pl.lit(f",{_REPLY}"), "said", pl.lit(f'"{_TRAINED}}}'))
    rows = rows.with_columns(line=(~pl.col("goes_on")).cum_sum(), piece=piece)
    whole = rows.group_by("line", maintain_order=True).agg(pl.col("piece").str.join(","), group=pl.col("message_id").first())
    start = f'{{"messages":[{_system(system)}'
    written = pl.concat_str(pl.lit(start), "piece", pl.lit("]}"))
    texts = whole.select(jsonl=_with_tools(written, tools) if tools else written).to_series()
    lines = whole.select("line", "group", texts, digests(texts).alias("digest"))
    return rows.join(lines, on="line", how="left", maintain_order="left").select(
        *[name for name in frame.columns if name not in _HELD],
        jsonl=pl.when(~pl.col("goes_on")).then("jsonl"),
        digest="digest",
        turn=pl.col("size").cast(pl.Int64) + bool(system),
        group="group",
    )
