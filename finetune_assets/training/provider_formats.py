"""Files as providers take them, made from a frozen data set at submit and checked before anything is uploaded.

    openai    {"messages": […]}; earlier replies have `weight: 0`, so that only the last one is learnt, as in local training
    azure     the same, in UTF-8 with a byte order mark
    nebius    {"messages": […]} without weights
    DPO       {"input": {"messages": […]}, "preferred_output": [reply], "non_preferred_output": [reply]}
    bedrock   {"schemaVersion": "bedrock-conversation-2024", …} or {"prompt", "completion"}
    sagemaker {"messages": […]}, the frozen rows themselves

A row of several targets (`rows: per_conversation`) keeps its weights where weights are taken; elsewhere each target has a
row of its own. Tool calls and `tools` are carried as they are in OpenAI's chat, whose rules are checked; Bedrock's rows have no
place for them, so they are refused.

Rules: https://platform.openai.com/docs/guides/supervised-fine-tuning, …/direct-preference-optimization,
https://docs.aws.amazon.com/bedrock/latest/userguide/model-customization-prepare.html. Raises DataError with file, line and rule.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from finetune_assets.dataset.formats import read_lines
from finetune_assets.errors import DataError
from finetune_assets.storage import replacing

Row = dict[str, Any]
Shape = Literal["messages", "weighted", "dpo", "bedrock_conversation", "bedrock_prompt"]

LEAST_ROWS = 10
MOST_BYTES = 512 * 10**6
MOST_ROW_TOKENS = 65_536
CHARS_PER_TOKEN = 3.3
"""Fewer than real Spanish and English text has with any current tokenizer (about 4), so an estimate is rather too high."""
MESSAGE_TOKENS = 4
MOST_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prepared:
    """One file, ready to be uploaded."""

    path: Path
    rows: int
    bytes: int
    tokens: int
    """Estimated, once over."""


def weighted(row: Row) -> Row:
    """A chat whose last reply alone is learnt; one that has weights keeps them."""
    messages = [dict(message) for message in row["messages"]]
    if any("weight" in message for message in messages):
        return row
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number != last:
            message["weight"] = 0
    return {**row, "messages": messages}


def preference(row: Row) -> Row:
    """TRL's conversational preference row as OpenAI has it."""
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {
        "input": {"messages": row["prompt"], **tools},
        "preferred_output": row["chosen"],
        "non_preferred_output": row["rejected"],
    }


def bedrock_conversation(row: Row) -> Row:
    """A chat as Nova and Llama take it: the system message stands apart, contents are lists of texts."""
    _refuse_tools(row)
    system = [{"text": m["content"]} for m in row["messages"] if m["role"] in ("system", "developer")]
    turns = [
        {"role": m["role"], "content": [{"text": m["content"]}]} for m in row["messages"] if m["role"] in ("user", "assistant")
    ]
    return {"schemaVersion": "bedrock-conversation-2024", **({"system": system} if system else {}), "messages": turns}


def bedrock_prompt(row: Row) -> Row:
    """A chat as one prompt and its completion, for models without a conversation schema."""
    _refuse_tools(row)
    *before, reply = row["messages"]
    lines = [m["content"] if m["role"] == "system" else f"{m['role'].capitalize()}: {m['content']}" for m in before]
    return {"prompt": "\n".join([*lines, "Assistant:"]), "completion": reply["content"]}


def _refuse_tools(row: Row) -> None:
    """Raises DataError for a row with tools or their calls."""
    if row.get("tools") or any(m.get("tool_calls") or m["role"] == "tool" for m in row["messages"]):
        raise DataError(
            "A row has tools or tool calls, for which Bedrock's training rows have no place. Train it with `trainer: openai`, "
            "`azure` or `local`, or leave `tools` and such conversations out."
        )


def per_reply(row: Row) -> list[Row]:
    """A row of its own for each message of weight 1; a row without weights as it is."""
    messages = row.get("messages") or []
    targets = [at for at, message in enumerate(messages) if message.get("weight") == 1]
    if not targets:
        return [row]
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return [{**row, "messages": plain[: at + 1]} for at in targets]


def _same(row: Row) -> Row:
    return row


CONVERT: dict[Shape, Callable[[Row], Row]] = {
    "messages": _same,
    "weighted": weighted,
    "dpo": preference,
    "bedrock_conversation": bedrock_conversation,
    "bedrock_prompt": bedrock_prompt,
}


def write(source: Path, target: Path, shape: Shape, *, bom: bool = False) -> Prepared:
    """Writes a provider's file and checks it. Raises DataError."""
    with replacing(target) as draft, draft.open("wb") as file:
        if bom:
            file.write(codecs.BOM_UTF8)
        for whole in read_lines(source):
            for row in [whole] if shape in ("weighted", "dpo") else per_reply(whole):
                file.write(json.dumps(CONVERT[shape](row), ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return check(target, shape, bom=bom)


def check(path: Path, shape: Shape, *, bom: bool = False, least_rows: int = LEAST_ROWS, most_bytes: int = MOST_BYTES) -> Prepared:
    """Reads a file again by the provider's published rules. Raises DataError at the first broken one."""
    size = path.stat().st_size
    if size > most_bytes:
        raise DataError(f"{path.name} has {size / 1e6:.0f} MB, the provider takes {most_bytes / 1e6:.0f} MB. Lower window_weeks.")
    rows = tokens = 0
    for number, row in _rows(path, bom):
        problem = _problem(row, shape)
        if problem is not None:
            raise DataError(f"{path.name}:{number}: {problem}, which the provider refuses.")
        size_of_row = estimate_tokens(row)
        if size_of_row > MOST_ROW_TOKENS:
            raise DataError(
                f"{path.name}:{number} has about {size_of_row:,} tokens, the provider takes {MOST_ROW_TOKENS:,} an example. "
                "Lower filters.context_chars."
            )
        tokens += size_of_row
        rows += 1
    if rows < least_rows:
        raise DataError(
            f"{path.name} has {rows} rows, the provider needs at least {least_rows}. Widen window_weeks, or add data."
        )
    return Prepared(path, rows, size, tokens)


def estimate_tokens(row: Row) -> int:
    """Tokens of a row without the provider's tokenizer, rather too many than too few."""
    texts = list(_texts(row))
    return math.ceil(sum(len(text) for text in texts) / CHARS_PER_TOKEN) + MESSAGE_TOKENS * len(texts)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in cast("dict[str, Any]", value).items():
            if key in ("content", "text", "prompt", "completion", "arguments", "description", "name") and isinstance(inner, str):
                yield inner
            elif isinstance(inner, (dict, list)):
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _texts(inner)


def _rows(path: Path, bom: bool) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(codecs.BOM_UTF8) != bom:
                raise DataError(f"{path.name}: a byte order mark is {'missing' if bom else 'there, but not allowed'}.")
            try:
                row = json.loads(line.removeprefix(codecs.BOM_UTF8))
            except ValueError:
                raise DataError(f"{path.name}:{number} is no JSON.") from None
            if not isinstance(row, dict):
                raise DataError(f"{path.name}:{number} is no JSON object.")
            yield number, cast("Row", row)


def _problem(row: Row, shape: Shape) -> str | None:  # noqa: PLR0911 - one return a rule
    if shape == "dpo":
        chats = row.get("input", {}).get("messages") or []
        if set(row) != {"input", "preferred_output", "non_preferred_output"}:
            return f"the keys are {sorted(row)}, not input, preferred_output and non_preferred_output"
        for key in ("preferred_output", "non_preferred_output"):
            if len(row[key]) != 1 or row[key][0].get("role") != "assistant" or not row[key][0].get("content"):
                return f"{key} is not exactly one reply of the assistant"
        if row["preferred_output"] == row["non_preferred_output"]:
            return "both outputs are the same"
        return _chat_problem(chats, last="user") or _tools_problem(row["input"].get("tools"))
    if shape == "bedrock_prompt":
        empty = [key for key in ("prompt", "completion") if not str(row.get(key) or "").strip()]
        return f"{empty[0]} is empty" if empty else None
    if shape == "bedrock_conversation":
        roles = [message["role"] for message in row["messages"]]
        expected = ["user" if n % 2 == 0 else "assistant" for n in range(len(roles))]
        if not roles or roles != expected or roles[-1] != "assistant":
            return f"the turns are {', '.join(roles) or 'none'}, not user and assistant in alternation"
        return None
    return _chat_problem(row.get("messages") or [], last="assistant") or _tools_problem(row.get("tools"))


def _chat_problem(messages: list[Row], last: str) -> str | None:  # noqa: PLR0911 - one return a rule
    if not messages:
        return "there are no messages"
    for number, message in enumerate(messages):
        role, where = message.get("role"), f"message {number + 1}"
        if role not in ROLES:
            return f"{where} has the role {role!r}"
        content = message.get("content")
        if not (isinstance(content, str) and content.strip()) and not message.get("tool_calls"):
            return f"{where} ({role}) is empty"
        if message.get("weight", 1) not in (0, 1) or ("weight" in message and role != "assistant"):
            return f"{where} ({role}) has the weight {message['weight']!r}"
        if role in ("system", "developer") and number > 0 and messages[number - 1].get("role") not in ("system", "developer"):
            return f"{where} is a {role} message after the first turn"
    if (problem := _calls_problem(messages)) is not None:
        return problem
    if messages[-1]["role"] not in (last, "tool" if last == "user" else last):
        return f"the last message is the {messages[-1]['role']}'s, not the {last}'s"
    if last == "assistant" and messages[-1].get("weight") == 0:
        return "no reply has a weight above 0"
    return None


def _calls_problem(messages: list[Row]) -> str | None:
    """Each call has an id, a name and arguments in JSON, and is answered by a `tool` message before anybody else speaks."""
    waiting: list[str] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool":
            if message.get("tool_call_id") not in waiting:
                return f"message {number} (tool) answers no call that is open"
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            return f"message {number} ({message['role']}) comes before the result of a tool call"
        for call in message.get("tool_calls") or []:
            function = call.get("function") or {}
            if not call.get("id") or call.get("type") != "function" or not NAME.fullmatch(str(function.get("name") or "")):
                return f"message {number} has a tool call without an id, the type function or a name that is allowed"
            if not _is_object(function.get("arguments")):
                return f"message {number} calls {function['name']} with arguments that are no JSON object"
            waiting.append(call["id"])
    return None


def _tools_problem(tools: Any) -> str | None:
    """`tools` as OpenAI's chat has them, at most MOST_TOOLS."""
    if tools is None:
        return None
    if not isinstance(tools, list) or len(cast("list[Any]", tools)) > MOST_TOOLS:
        return f"`tools` is no list of at most {MOST_TOOLS}"
    for tool in cast("list[Row]", tools):
        if tool.get("type") != "function" or not NAME.fullmatch(str((tool.get("function") or {}).get("name") or "")):
            return "`tools` holds what is no function with a name of letters, digits, _ and -"
    return None


def _is_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False
