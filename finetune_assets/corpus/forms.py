"""One row of a fine-tuning file becomes turns of a conversation, or is unusable for a named reason.

    messages                    {"messages": [{"role", "content", "tool_calls"?}, …], "tools"?}
    prompt/completion           {"prompt": text or messages, "completion": text or messages}
    user/assistant              {"user": text, "assistant": text}
    instruction/input/output    {"instruction": text, "input"?: text, "output": text, or JSON tool calls}
    sharegpt                    {"conversations": [{"from", "value"}, …]}
    request/response            {"request": a chat-completions request, "response": its answer, "timestamp"?: a time}: a log
    chosen/rejected             {"prompt"?: text or messages, "chosen": text or messages, "rejected": …}: a reply corrected

Beside them a row may have `user_id`, `intent`, `timestamp` (seconds or milliseconds since 1970, or ISO 8601 with its zone) and
`label` (true or false: a thumb for its last reply). Left aside, and counted, are system messages and `tools` (an assistant's
settings say both), and a timestamp or label that is none.
A tool call is the text `{"tool_calls":[{"name":…,"arguments":{…}},…]}` of the reply, a tool's answer the user's text
`{"tool_result":…}`: so every rule for texts (personal data, lengths, near-duplicates) holds for them too.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "user/assistant": ("user", "assistant"),
    "instruction/input/output": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "request/response": ("request", "response"),
    "chosen/rejected": ("chosen", "rejected"),
}
"""The keys that a row of each form must have."""
REASONS: tuple[str, ...] = (
    *("json_invalid", "not_an_object", "form_unknown", "role_unknown", "content_missing", "content_unsupported"),
    *(
        "tool_call_invalid",
        "weight_zero",
        "no_user_turn",
        "no_reply",
        "row_repeated",
        "row_continued",
        "pair_equal",
        "pair_unlike",
        "text_broken",
    ),
)
"""Why a row is unusable."""
_BROKEN = re.compile("[\0\ufffd\ud800-\udfff]")  # NUL, U+FFFD, lone surrogates: a run rejects each as `text_broken`
FIRST_SECOND, LAST_SECOND = 946_684_800, 4_102_444_800  # the years 2000 and 2100, beyond which a run takes no time
LONG_NUMBER = 10**6  # whole numbers from here on become texts in arguments: a placeholder in their place leaves the JSON whole


class Unusable(Exception):
    """A row that makes no conversation."""

    def __init__(self, reason: str, detail: str) -> None:
        """`reason` is one of REASONS; `detail` never quotes the row."""
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Record:
    """A conversation: (role, text) turns, and what else the row said."""

    turns: tuple[tuple[str, str], ...]
    user_id: str | None
    intent: str | None
    left_aside: tuple[str, ...]  # "system", "tools", a "timestamp" or "label" that says nothing
    seconds: float | None = None  # since 1970, where the row said it
    correction: str | None = None  # what the last reply should have been
    good: bool | None = None  # the thumb for the last reply


def record_of(row: Any, form: str | None = None) -> Record:
    """The conversation in a row; `form` null finds the form by the row's keys. Raises Unusable."""
    if not isinstance(row, Mapping):
        raise Unusable("not_an_object", f"it is a {type(row).__name__}, not an object with keys")
    keys = cast("Mapping[str, Any]", row)
    cells = {key: value for key, value in keys.items() if value is not None and value != ""}
    form = form or form_of(cells, keys)
    missing = [key for key in FORMS[form] if key not in cells]
    if missing:
        raise Unusable("content_missing", f"{' and '.join(missing)} of the form {form} is missing or empty")
    if form == "request/response":
        cells, form = _logged(cells), "messages"
    correction: str | None = None
    if form == "chosen/rejected":
        cells, correction = _pair(cells)
        form = "messages"
    messages = _messages(cells, form)
    left_aside = {"tools"} if cells.get("tools") else set[str]()
    turns: list[tuple[str, str]] = []
    names = call_names(messages)
    for number, message in enumerate(messages, start=1):
        turn = _turn(message, f"message {number}", names)
        if turn is None:
            left_aside.add("system")
        else:
            turns.append(turn)
    roles = [role for role, _ in turns]
    if "user" not in roles:
        raise Unusable("no_user_turn", "it holds no message of a user")
    if "assistant" not in roles[roles.index("user") :]:
        raise Unusable("no_reply", "it holds no message of the assistant after one of the user")
    seconds, good = _seconds(cells.get("timestamp")), _thumb(cells.get("label"))
    left_aside |= {key for key, value in (("timestamp", seconds), ("label", good)) if key in cells and value is None}
    record = Record(
        tuple(turns),
        _label(cells.get("user_id")),
        _label(cells.get("intent")),
        tuple(sorted(left_aside)),
        seconds,
        correction,
        good,
    )
    _check_texts(record)
    return record


def _check_texts(record: Record) -> None:
    """Raises Unusable for what a run would reject as `text_broken`."""
    texts = [(f"the text of turn {number}", text) for number, (_, text) in enumerate(record.turns, start=1)]
    texts += [("the chosen reply", record.correction or ""), ("its user_id", record.user_id or "")]
    broken = next((what for what, text in texts if _BROKEN.search(text)), None)
    if broken:
        raise Unusable("text_broken", f"{broken} holds NUL, U+FFFD or half a surrogate pair: letters were lost; export it again")


def form_of(*rows: Mapping[str, Any]) -> str:
    """The one form whose keys a row has; a second row is asked where the first has none. Raises Unusable."""
    found: list[str] = []
    for row in rows:
        found = found or [form for form, keys in FORMS.items() if all(key in row for key in keys)]
    if len(found) != 1:
        said = f"of {' and '.join(found)} at once" if found else f"of none of the forms {', '.join(FORMS)}"
        raise Unusable("form_unknown", f"it has the keys {said}")
    return found[0]


CALLS, RESULT = '{"tool_calls":', '{"tool_result":'
"""How the text of a reply that calls tools begins, and that of a tool's answer."""


def calls_text(calls: Sequence[Mapping[str, Any]], content: str = "") -> str:
    """The text of a reply that calls tools (name, arguments), with what it says beside them."""
    return _json({"tool_calls": list(calls), **({"content": content} if content else {})})


def result_text(name: str, content: str) -> str:
    """The text of a tool's answer."""
    return _json({"tool_result": {"name": name, "content": content}})


def parsed_call(text: str) -> dict[str, Any] | None:
    """What `calls_text` (tool_calls, content) or `result_text` (tool_result) was made of; null for any other text."""
    try:
        value: Any = json.loads(text)
        if isinstance(value, dict) and set(cast("dict[str, Any]", value)) == {"tool_result"}:
            return value if set(cast("Any", value)["tool_result"]) == {"name", "content"} else None
        if not isinstance(value, dict) or not {"tool_calls"} <= set(cast("dict[str, Any]", value)) <= {"tool_calls", "content"}:
            return None
        return {**value, "tool_calls": calls_of(value)}
    except (ValueError, RecursionError, TypeError, Unusable):
        return None


def _messages(row: Mapping[str, Any], form: str) -> list[Any]:
    if form == "messages":
        return _listed(row["messages"])
    if form == "sharegpt":
        return [_from_value(message) for message in _listed(row["conversations"])]
    if form == "prompt/completion":
        return [*_said("user", row["prompt"]), *_said("assistant", row["completion"])]
    if form == "user/assistant":
        return [*_said("user", row["user"]), *_said("assistant", row["assistant"])]
    if not all(isinstance(row.get(key, ""), str) for key in ("instruction", "input")):
        raise Unusable("content_unsupported", "instruction and input must be texts")
    asked = "\n\n".join(part for key in ("instruction", "input") if (part := str(row.get(key, "")).strip()))
    output = row["output"]
    calls = _calls_in(output)
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": None, "tool_calls": calls} if calls else {"role": "assistant", "content": output},
    ]


def _from_value(message: Any) -> Any:
    """A message of ShareGPT as one of `messages`; a function call is a reply made of tool calls."""
    if not isinstance(message, Mapping) or "from" not in message:
        return message
    cells = cast("Mapping[str, Any]", message)
    if cells["from"] == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": cells.get("value")}
    return {"role": cells["from"], "content": cells.get("value")}


def _logged(row: Mapping[str, Any]) -> dict[str, Any]:
    """A logged call as a row of `messages`: what was asked, and the answer's first choice. Raises Unusable."""
    request, response = _object(row, "request"), _object(row, "response")
    choices = response.get("choices")
    choice: Any = cast("Sequence[Any]", choices)[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping) or not isinstance(cast("Mapping[str, Any]", choice).get("message"), Mapping):
        raise Unusable("content_missing", "its response holds no choice with a message (a stream has to be put together first)")
    return {
        "user_id": request.get("user"),
        **{key: value for key, value in row.items() if key not in ("request", "response")},
        "messages": [*_listed(request.get("messages")), cast("Mapping[str, Any]", choice)["message"]],
        "tools": request.get("tools"),
    }


def _pair(row: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A preference as a row of `messages` with its rejected reply, and the chosen one. Raises Unusable."""
    prompt = _said("user", row["prompt"]) if "prompt" in row else []
    chosen, rejected = ([*prompt, *_said("assistant", row[key])] for key in ("chosen", "rejected"))
    better, worse = (
        _turn(messages[-1], f"the last message of {key}", {}) for key, messages in (("chosen", chosen), ("rejected", rejected))
    )
    if better is None or worse is None or better[0] != "assistant" or worse[0] != "assistant":
        raise Unusable("no_reply", "chosen and rejected must end with a message of the assistant")
    if better == worse:
        raise Unusable("pair_equal", "chosen and rejected are the same reply")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("pair_unlike", "chosen and rejected answer different conversations")
    return {**{key: value for key, value in row.items() if key not in ("chosen", "rejected")}, "messages": rejected}, better[1]


def _seconds(value: Any) -> float | None:
    """Since 1970, of a number of seconds or milliseconds (also as the text of a cell) or of a time with its zone; else null."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                value = dt.datetime.fromisoformat(value.strip())
            except ValueError:
                return None
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        value = value.timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not FIRST_SECOND <= value < LAST_SECOND * 1000:
        return None
    return float(value) if value < LAST_SECOND else value / 1000 if value >= FIRST_SECOND * 1000 else None


def _thumb(label: Any) -> bool | None:
    """A KTO label, also as the text of a CSV cell."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(label).strip().lower())


def _object(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object, also as the JSON of a cell. Raises Unusable."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Unusable("json_invalid", f"its {key} is a text that is no JSON") from None
    if not isinstance(value, Mapping):
        raise Unusable("content_missing", f"its {key} is missing or no object")
    return cast("Mapping[str, Any]", value)


def _said(role: str, value: Any) -> list[Any]:
    """A prompt or completion: a text, or messages (also as the JSON of a CSV cell)."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _listed(value)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Unusable("json_invalid", "its messages are a text that is no JSON") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise Unusable("content_missing", "its messages are no list, or an empty one")
    return list(cast("Sequence[Any]", value))


_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": None,
    "developer": None,
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def call_names(messages: Sequence[Any]) -> dict[str, str]:
    """The name of each call that has an id: a tool's answer has only the id."""
    names: dict[str, str] = {}
    for message in messages:
        calls: Any = cast("Mapping[str, Any]", message).get("tool_calls") if isinstance(message, Mapping) else None
        for call in cast("list[Any]", calls) if isinstance(calls, list) else []:
            cells = cast("Mapping[str, Any]", call) if isinstance(call, Mapping) else {}
            function = cells.get("function")
            name: Any = cast("Mapping[str, Any]", function).get("name") if isinstance(function, Mapping) else cells.get("name")
            if isinstance(cells.get("id"), str) and isinstance(name, str):
                names[cells["id"]] = name
    return names


def _turn(message: Any, where: str, names: Mapping[str, str]) -> tuple[str, str] | None:
    """(role, text) of a message, null for the system's. `names`: of calls by their id. Raises Unusable."""
    if not isinstance(message, Mapping):
        raise Unusable("not_an_object", f"{where} is no object")
    cells = cast("Mapping[str, Any]", message)
    named = cells.get("role")
    if not isinstance(named, str) or named.strip().lower() not in _ROLES:
        raise Unusable("role_unknown", f"the role of {where} is none of {', '.join(_ROLES)}")
    role = _ROLES[named.strip().lower()]
    if role is None:
        return None
    if role == "assistant" and cells.get("weight") == 0:
        raise Unusable(
            "weight_zero", f"{where} has weight 0, but every reply of a conversation is trained on; give the rows apart"
        )
    content = _text(cells.get("content"), where)
    if role == "tool":
        return "user", result_text(str(cells.get("name") or names.get(str(cells.get("tool_call_id"))) or ""), content)
    calls = cells.get("tool_calls") or cells.get("function_call")
    if role == "assistant" and calls:
        return role, calls_text(calls_of(calls), content)
    if not content:
        raise Unusable("content_missing", f"{where} has no text")
    return role, content


def _text(content: Any, where: str) -> str:
    """The text of a message's content, which may come in parts; empty for none."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, Sequence):
        parts = [cast("Mapping[str, Any]", part) for part in cast("Sequence[Any]", content) if isinstance(part, Mapping)]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) == len(cast("Sequence[Any]", content)):
            return "\n".join(texts).strip()
    raise Unusable("content_unsupported", f"{where} holds something other than text (an image, a file)")


# --- tool calls


def _calls_in(output: Any) -> Any:
    """What reads like tool calls in the output of an instruction, else null: then the output is an ordinary text."""
    if isinstance(output, str):
        if not output.lstrip().startswith(("{", "[")):
            return None
        try:
            output = json.loads(output)
        except ValueError:
            return None
    listed = output if isinstance(output, list) else [output]
    return output if listed and all(_reads_like_a_call(one) for one in listed) else None


def _reads_like_a_call(value: Any) -> bool:
    keys = set(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else set[str]()
    return "tool_calls" in keys or bool({"name", "tool", "function"} & keys and {"arguments", "parameters", "function"} & keys)


def calls_of(value: Any) -> list[dict[str, Any]]:
    """Tool calls in the writings of OpenAI ({"function": {"name", "arguments"}}) and of data sets ({"name" or "tool", …}).
    Raises Unusable."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Unusable("tool_call_invalid", "its tool calls are a text that is no JSON") from None
    if isinstance(value, Mapping) and "tool_calls" in value:
        value = cast("Mapping[str, Any]", value)["tool_calls"]
    listed: list[Any] = list(cast("Sequence[Any]", value)) if isinstance(value, list) else [value]
    if not listed:
        raise Unusable("tool_call_invalid", "its list of tool calls is empty")
    return [_call(one) for one in listed]


def _call(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and isinstance(inner := cast("Mapping[str, Any]", value).get("function"), Mapping):
        value = cast("Any", inner)
    if not isinstance(value, Mapping):
        raise Unusable("tool_call_invalid", "a tool call is no object")
    cells = cast("Mapping[str, Any]", value)
    name = next((cells[key] for key in ("name", "tool", "function") if isinstance(cells.get(key), str) and cells[key]), None)
    arguments: Any = next((cells[key] for key in ("arguments", "parameters") if cells.get(key) is not None), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise Unusable("tool_call_invalid", "the arguments of a tool call are a text that is no JSON") from None
    if name is None or not isinstance(arguments, Mapping):
        raise Unusable("tool_call_invalid", "a tool call needs a name, and an object of arguments")
    return {"name": name, "arguments": _short_numbers(arguments)}


def _short_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _short_numbers(one) for key, one in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list):
        return [_short_numbers(one) for one in cast("list[Any]", value)]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= LONG_NUMBER else value


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _label(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int) else None
