"""A small template grammar: `{a|b}` picks one, `<slot>` fills in, `~tú form/vos form~` follows the tenant's region.

A slot whose value is a list is a set of templates and is expanded in turn; a slot whose value is a string is put in as it is.
"""

from __future__ import annotations

import random
import re
from functools import cache

Slots = dict[str, "str | list[str]"]
Node = tuple[str, object]

SHIELD_OPEN, SHIELD_CLOSE = "\ue000", "\ue001"
_TOKEN = re.compile(r"([{}|]|<[a-z_0-9]+>|~[^~/]*/[^~/]*~)")


class GrammarError(ValueError):
    """A template that cannot be parsed or that names a slot nobody filled."""


@cache
def parse(template: str) -> tuple[Node, ...]:
    """Turn a template into a tuple of nodes: text, slot, register or choice."""
    tokens = [token for token in _TOKEN.split(template) if token]
    nodes, end = _sequence(tokens, 0, template)
    if end != len(tokens):
        raise GrammarError(f"unbalanced braces in template {template!r}")
    return nodes


def _sequence(tokens: list[str], at: int, template: str) -> tuple[tuple[Node, ...], int]:
    nodes: list[Node] = []
    while at < len(tokens) and tokens[at] not in ("|", "}"):
        token = tokens[at]
        if token == "{":
            branches: list[tuple[Node, ...]] = []
            while True:
                branch, at = _sequence(tokens, at + 1, template)
                branches.append(branch)
                if at >= len(tokens):
                    raise GrammarError(f"unbalanced braces in template {template!r}")
                if tokens[at] == "}":
                    break
            nodes.append(("choice", tuple(branches)))
        elif token[0] == "<" and len(token) > 2:
            nodes.append(("slot", token[1:-1]))
        elif token[0] == "~" and len(token) > 1:
            nodes.append(("register", tuple(token[1:-1].split("/"))))
        else:
            nodes.append(("text", token))
        at += 1
    return tuple(nodes), at


def expand(rng: random.Random, template: str, slots: Slots, voseo: bool) -> str:
    """One random text of a template, not yet tidied."""
    return "".join(_walk(rng, parse(template), slots, voseo))


def _walk(rng: random.Random, nodes: tuple[Node, ...], slots: Slots, voseo: bool) -> list[str]:
    out: list[str] = []
    for kind, value in nodes:
        if kind == "text":
            out.append(str(value))
        elif kind == "register":
            out.append(value[1 if voseo else 0])  # type: ignore[index]
        elif kind == "choice":
            out += _walk(rng, rng.choice(value), slots, voseo)  # type: ignore[arg-type]
        else:
            if value not in slots:
                raise GrammarError(f"slot <{value}> has no value; known: {', '.join(sorted(slots))}")
            filled = slots[str(value)]
            out.append(expand(rng, rng.choice(filled), slots, voseo) if isinstance(filled, list) else filled)
    return out


def shield(text: str) -> str:
    """Mark a value (a name, an address) that noise must leave as it is."""
    return f"{SHIELD_OPEN}{text}{SHIELD_CLOSE}"


def unshield(text: str) -> str:
    """Drop the marks of `shield`."""
    return text.replace(SHIELD_OPEN, "").replace(SHIELD_CLOSE, "")


def tidy(text: str) -> str:
    """Mend spaces and give each sentence its capital letter."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([,.;:!?])", r"\1", text)
    text = re.sub(r"([,;]),+", r"\1", text)
    text = re.sub(r"([,;:])([.!?])", r"\2", text)
    text = re.sub(r"([?!])\.(?!\.)", r"\1", text)
    text = re.sub(r"([¿¡]) ", r"\1", text)
    text = re.sub(r"(?<!\d)\.\.(?!\.)", ".", text)
    text = re.sub(r"\bde el\b", "del", text)
    text = re.sub(r"\ba el\b", "al", text)
    return re.sub(r"(^[¿¡\s]*|(?<=[.!?…]) [¿¡]*)([a-záéíóúñ])", lambda found: found[1] + found[2].upper(), text)
