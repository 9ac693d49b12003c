"""Files as providers take them, made from a frozen data set at submit and checked before anything is uploaded.

    openai    {"messages": […]}; earlier replies have `weight: 0`, so that only the last one is learnt, as in local training
    azure     the same, in UTF-8 with a byte order mark
    nebius    {"messages": […]} without weights
    DPO       {"input": {"messages": […]}, "preferred_output": [reply], "non_preferred_output": [reply]}
    bedrock   {"schemaVersion": "bedrock-conversation-2024", …}; Claude {"system", "messages"} of plain texts; others
              {"prompt", "completion"}
    sagemaker the frozen rows themselves; serverless: {"messages": […]}, or {"prompt", "chosen", "rejected"}

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
Shape = Literal[
    "messages", "weighted", "dpo", "bedrock_conversation", "bedrock_claude", "bedrock_prompt", "preferences", "frozen"
]

LEAST_ROWS = 10
MOST_BYTES = 512 * 10**6
MOST_ROW_TOKENS = 65_536
CHARS_PER_TOKEN = 3.3
"""Fewer than real Spanish and English text has with any current tokenizer (about 4), so an estimate is rather too high."""
MESSAGE_TOKENS = 4
REPLY_TOKENS = 80
"""Of a usual reply, for estimates of what replies cost."""
MOST_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
RESERVED = ("User:", "Bot:", "Assistant:", "System:", "<image>", "<video>", "[EOS]")
"""Beginnings of a user's or system's text that Nova's fine-tuning refuses."""
KEYS: dict[str, set[str]] = {
    "messages": {"messages", "tools", "parallel_tool_calls"},
    "weighted": {"messages", "tools", "parallel_tool_calls"},
}
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


def bedrock_claude(row: Row) -> Row:
    """A chat as Claude 3 Haiku takes it: the system message stands apart, contents are plain texts."""
    _refuse_tools(row)
    system = "\n".join(m["content"] for m in row["messages"] if m["role"] in ("system", "developer"))
    turns = [{"role": m["role"], "content": m["content"]} for m in row["messages"] if m["role"] in ("user", "assistant")]
    return {**({"system": system} if system else {}), "messages": turns}


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
    "bedrock_claude": bedrock_claude,
    "bedrock_prompt": bedrock_prompt,
    "preferences": _same,
    "frozen": _same,
}
WHOLE: tuple[Shape, ...] = ("weighted", "dpo", "preferences", "frozen")
"""Shapes in which a row of several targets stays one row."""


def write(source: Path, target: Path, shape: Shape, *, bom: bool = False, least_rows: int = LEAST_ROWS) -> Prepared:
    """Writes a provider's file and checks it. Raises DataError."""
    with replacing(target) as draft, draft.open("wb") as file:
        if bom:
            file.write(codecs.BOM_UTF8)
        for whole in read_lines(source):
            for row in [whole] if shape in WHOLE else per_reply(whole):
                file.write(json.dumps(CONVERT[shape](row), ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return check(target, shape, bom=bom, least_rows=least_rows)


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
    """Tokens of a row without the provider's tokenizer, rather too many than too few; `tools` as the JSON that they are."""
    texts = list(_texts(row))
    return math.ceil(sum(len(text) for text in texts) / CHARS_PER_TOKEN) + MESSAGE_TOKENS * len(texts)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in cast("dict[str, Any]", value).items():
            if key in ("content", "text", "prompt", "completion", "arguments", "description", "name") and isinstance(inner, str):
                yield inner
            elif key == "tools" and inner:
                yield json.dumps(inner, ensure_ascii=False)
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


def _problem(row: Row, shape: Shape) -> str | None:
    if shape == "frozen":
        return None  # this project's own rows, for this project's own trainer
    if shape in ("dpo", "preferences"):
        return _preference_problem(row, shape)
    if shape == "bedrock_prompt":
        empty = [key for key in ("prompt", "completion") if not str(row.get(key) or "").strip()]
        return f"{empty[0]} is empty" if empty else None
    if shape in ("bedrock_conversation", "bedrock_claude"):
        return _turns_problem(row, RESERVED if shape == "bedrock_conversation" else ())
    if extra := set(row) - KEYS[shape]:
        return f"the key {min(extra)!r} is none of {', '.join(sorted(KEYS[shape]))}"
    return _chat_problem(row.get("messages") or [], last="assistant") or _tools_problem(row.get("tools"))


def _turns_problem(row: Row, reserved: tuple[str, ...]) -> str | None:
    """User and assistant in alternation, and no text of the user or system that begins with a reserved word."""
    roles = [message["role"] for message in row["messages"]]
    if not roles or roles != ["user" if n % 2 == 0 else "assistant" for n in range(len(roles))] or roles[-1] != "assistant":
        return f"the turns are {', '.join(roles) or 'none'}, not user and assistant in alternation"
    asked = [row.get("system") or [], *(message["content"] for message in row["messages"] if message["role"] == "user")]
    texts = (text for part in asked for text in ([part] if isinstance(part, str) else (one["text"] for one in part)))
    word = next((word for text in texts for word in reserved if text.lstrip().startswith(word)), None)
    return f"a text begins with the reserved word {word!r}" if word else None


def _preference_problem(row: Row, shape: Shape) -> str | None:
    """Two different replies to one prompt; a reply may be nothing but a tool call."""
    names = ("input", "preferred_output", "non_preferred_output") if shape == "dpo" else ("prompt", "chosen", "rejected")
    if not set(names) <= set(row) <= {*names, *(() if shape == "dpo" else ("tools",))}:
        return f"the keys are {', '.join(sorted(row))}, not {', '.join(names)}"
    chats: list[Row] = row["input"].get("messages") or [] if shape == "dpo" else row["prompt"]
    tools = row["input"].get("tools") if shape == "dpo" else row.get("tools")
    for key in names[1:]:
        reply: Row = row[key][0] if len(row[key]) == 1 else {}
        if reply.get("role") != "assistant" or not (reply.get("content") or reply.get("tool_calls")):
            return f"{key} is not exactly one reply of the assistant"
        if reply.get("tool_calls") and not tools:
            return f"{key} calls a tool, but the row has no `tools`"
        if problem := _calls_problem([{"role": "user", "content": "…"}, reply]):
            return f"{key}: {problem.replace('message 2', 'the reply')}"
    if row[names[1]] == row[names[2]]:
        return "both outputs are the same"
    return _chat_problem(chats, last="user") or _tools_problem(tools)


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
    if last == "assistant" and not any(m["role"] == "assistant" and m.get("weight") != 0 for m in messages):
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
