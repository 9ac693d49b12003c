"""Tool calls in what a model wrote, in the text that the corpus has for them; and whether two replies call the same.

A chat template may write a call in many ways. Read are those of Hermes and Qwen (`<tool_call>{…}</tool_call>`), bare JSON objects
with `name` and `arguments` or `parameters` at a reply's end (Llama, Mistral, and others whose mark is a special token), and the
corpus' own. Exactness is that of the Berkeley Function-Calling Leaderboard's AST check (Patil et al. 2025) without its types:
the same functions with equal arguments, in any order.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from finetune_assets.corpus.forms import calls_text, parsed_call

Call = dict[str, Any]
"""name, arguments."""
_MARKED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_START = re.compile(r"[\[{]")


def as_said(text: str) -> str:
    """The corpus' text of a reply that calls tools; any other reply as it is."""
    if parsed_call(text) is not None:
        return text
    found = _marked(text) if "<tool_call>" in text else _bare(text)
    return text if found is None else calls_text(found[0], found[1])


def calls(text: str) -> list[Call]:
    """The calls in a text of the corpus; none in any other."""
    return list((parsed_call(text) or {}).get("tool_calls", []))


def exact(reply: str, reference: str) -> bool | None:
    """Whether both call the same functions with equal arguments, in any order; null where neither calls."""
    mine, wanted = calls(reply), calls(reference)
    return same(mine, wanted) if mine or wanted else None


def same(first: Sequence[Call], second: Sequence[Call]) -> bool:
    """Whether two lists hold the same functions with equal arguments, in any order."""
    return Counter(map(_key, first)) == Counter(map(_key, second))


def _key(call: Call) -> str:
    return json.dumps([call["name"], call["arguments"]], sort_keys=True, ensure_ascii=False)


def _marked(text: str) -> tuple[list[Call], str] | None:
    found = [_call(_value(block)) for block in _MARKED.findall(text)]
    content = _MARKED.sub("", text).strip()
    return None if None in found else (cast("list[Call]", found), content)


def _bare(text: str) -> tuple[list[Call], str] | None:
    """Calls from the first bracket on whose rest is nothing but calls."""
    for start in _START.finditer(text):
        made = _values(text[start.start() :])
        found = [_call(value) for value in made] if made else []
        if found and None not in found:
            return cast("list[Call]", found), text[: start.start()].strip()
    return None


def _values(text: str) -> list[Any] | None:
    """JSON values one after the other, lists taken apart; null where anything else stands among them."""
    decoder, made, at = json.JSONDecoder(), list[Any](), 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        made += cast("Sequence[Any]", value) if isinstance(value, list) else [value]
        at += len(text[at:]) - len(text[at:].lstrip(" \n\t\r,;"))
    return made


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    known = cast("Call", value)
    known = cast("Call", known["function"]) if isinstance(known.get("function"), dict) else known
    arguments = known.get("arguments", known.get("parameters"))
    arguments = _value(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(known.get("name"), str) or not isinstance(arguments, dict):
        return None
    return {"name": known["name"], "arguments": arguments}
