"""Tool calls in the lines of a data set, in the form of OpenAI's API, which TRL and chat templates share.

    {"role":"assistant","content":"","tool_calls":[{"id":"call_1","type":"function","function":{"name":…,"arguments":"{…}"}}]}
    {"role":"tool","tool_call_id":"call_1","name":…,"content":…}

In the corpus a call is a text of the assistant, and its result a text of the user (`corpus.forms`), so that each rule for texts
holds for them too. `messages_of` makes messages of such texts, `as_texts` the texts of the messages again. A result that answers
no call (its call was cut off with the oldest turns, or somebody typed it) stays the user's text: no provider takes a `tool`
message without its call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from finetune_assets.corpus.forms import CALLS, RESULT, calls_text, parsed_call, result_text

Message = dict[str, Any]
Turn = tuple[str, str]
"""Role and text."""
IN_LINE = json.dumps(CALLS)[1:-1]
"""What a line of JSON holds if one of its texts is made of calls."""
WRITTEN = b'"tool_calls"'
"""What a written line holds if one of its messages calls a tool."""
_TARGETS = {"messages": (), "prompt": ("chosen", "rejected", "completion")}


def messages_of(turns: Iterable[Turn]) -> list[Message]:
    """The messages of some turns. Calls are numbered from 1 on; a result belongs to the first open call of its name."""
    made: list[Message] = []
    open_calls: list[tuple[str, str]] = []  # id, name
    called = 0
    for role, text in turns:
        for piece in _pieces(role, text):
            if isinstance(piece, str):
                made.append({"role": role, "content": piece})
            elif role == "assistant":
                calls = [_written(call, called + n) for n, call in enumerate(piece["tool_calls"], start=1)]
                called += len(calls)
                open_calls = [(call["id"], call["function"]["name"]) for call in calls]
                before = made.pop()["content"] if made and made[-1]["role"] == role and "tool_calls" not in made[-1] else ""
                content = "\n".join(part for part in (before, piece.get("content", "")) if part)
                made.append({"role": role, "content": content, "tool_calls": calls})
            else:
                name, content = str(piece["tool_result"]["name"]), str(piece["tool_result"]["content"])
                match = next((call for call in open_calls if name in ("", call[1])), None)
                if match is None:
                    made.append({"role": role, "content": result_text(name, content)})
                    continue
                open_calls.remove(match)
                named = {"name": name} if name else {}
                made.append({"role": "tool", "tool_call_id": match[0], **named, "content": content})
    return made


def _pieces(role: str, text: str) -> Iterable[str | dict[str, Any]]:
    """The texts of a turn, and what it calls or was answered: several messages of one speaker stand in it, one a line or more."""
    mark = CALLS if role == "assistant" else RESULT
    plain: list[str] = []
    for line in text.split("\n"):
        piece = parsed_call(line) if line.startswith(mark) else None
        if piece is None:
            plain.append(line)
            continue
        if plain:
            yield "\n".join(plain)
            plain = []
        yield piece
    if plain:
        yield "\n".join(plain)


def _written(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    arguments = json.dumps(call["arguments"], ensure_ascii=False, separators=(",", ":"))
    return {"id": f"call_{number}", "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def said(message: Mapping[str, Any]) -> str:
    """The text of one message, as the corpus has it."""
    content = str(message.get("content") or "")
    if message["role"] == "tool":
        return result_text(str(message.get("name") or ""), content)
    calls = cast("list[dict[str, Any]]", message.get("tool_calls") or [])
    if not calls:
        return content
    functions = [call["function"] for call in calls]
    return calls_text([{"name": f["name"], "arguments": json.loads(f["arguments"])} for f in functions], content)


def as_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of any file with role and text of each message alone; the last of several messages in a row of the user's or of
    tools holds the text of them all, as the turn of the corpus does."""
    changed = {key: _plain(value) for key, value in row.items() if key in _TARGETS or key in _TARGETS["prompt"]}
    return {**row, **changed}


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    made: list[Message] = []
    for message in messages:
        role = "user" if message["role"] == "tool" else message["role"]
        text = said(message)
        if role == "user" and made and made[-1]["role"] == "user":
            text = f"{made[-1]['content']}\n{text}"
        weight = {"weight": message["weight"]} if "weight" in message else {}
        made.append({"role": role, "content": text, **weight})
    return made
