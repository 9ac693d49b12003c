"""What the assistant's YAML says a reply must and must not hold, checked without regard to case.

A rule applies to a row whose intent is the rule's and whose last user turn matches `when` (all rows where it names neither). It
holds if one of `contains_any` matches, or there is none to match, nothing of `not_contains` does, and the reply has the form that
is asked for: JSON, a length, a language (which a short reply may not tell; then it holds).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.assistants.settings.evaluation import Rule
from finetune_assets.evaluation.candidates import TestRow
from finetune_assets.evaluation.language import language_of

FIT = 0.5
"""A rule that fewer than this share of the references keep does not fit the data: it is shown, and left out of the measure."""
LONGEST = 20_000  # characters of a reply that are searched


def applies(rule: Rule, row: TestRow) -> bool:
    """Whether the rule is about this row."""
    if rule.intent is not None and rule.intent != row.intent:
        return False
    return rule.when is None or _found(rule.when, row.user_text)


def holds(rule: Rule, reply: str) -> bool:
    """Whether a reply keeps the rule."""
    if rule.contains_any and not any(_found(pattern, reply) for pattern in rule.contains_any):
        return False
    return not forbidden(rule, reply) and _formed(rule, reply)


def forbidden(rule: Rule, reply: str) -> bool:
    """Whether a reply says what the rule forbids."""
    return any(_found(pattern, reply) for pattern in rule.not_contains)


def breaks(rule: Rule, question: str, reply: str) -> bool:
    """Whether a reply that a user gets is none that the rule allows: it says what is forbidden, or has not the form.

    `contains_any` is left to the benchmark, since it tells what good replies mostly hold; so are rules for one intent, which
    nobody knows of a live message. `question`: the user's last turn, which `when` looks at.
    """
    if rule.intent is not None or (rule.when is not None and not _found(rule.when, question)):
        return False
    return forbidden(rule, reply) or not _formed(rule, reply)


def is_json(text: str) -> bool:
    """Whether the whole text is one JSON value (RFC 8259: no NaN or Infinity)."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _formed(rule: Rule, reply: str) -> bool:
    length = len(reply.strip())
    return (
        length >= (rule.min_chars or 0)
        and (rule.max_chars is None or length <= rule.max_chars)
        and (not rule.json_ or is_json(reply))
        and (rule.language is None or language_of(reply) in (rule.language, None))
    )


def verdicts(rules: Sequence[Rule], rows: Sequence[TestRow], replies: Sequence[str | None]) -> NDArray[np.float64]:
    """[rows, rules]: 1 holds, 0 broken, NaN does not apply, or there is no reply."""
    made = np.full((len(rows), len(rules)), np.nan)
    for n, (row, reply) in enumerate(zip(rows, replies, strict=True)):
        for m, rule in enumerate(rules):
            if reply is not None and applies(rule, row):
                made[n, m] = holds(rule, reply)
    return made


def sums(table: NDArray[np.float64], fitting: Sequence[bool]) -> NDArray[np.float64]:
    """[rows, (kept, applicable)] over the rules that fit the data."""
    used = table[:, np.array(fitting, bool)]
    return np.stack([np.nansum(used, axis=1), np.sum(~np.isnan(used), axis=1).astype(np.float64)], axis=1)


def fits(references: NDArray[np.float64]) -> list[bool]:
    """Of each rule (columns of the references' verdicts): whether it applies anywhere and the references keep it."""
    return [bool(there.any() and np.nanmean(column) >= FIT) for column in references.T for there in [~np.isnan(column)]]


def table(
    rules: Sequence[Rule], rows: Sequence[TestRow], references: NDArray[np.float64], replies: dict[str, NDArray[np.float64]]
) -> list[dict[str, Any]]:
    """One entry a rule: how often it applies, how often references and candidates keep it."""
    fit = fits(references)
    return [
        {
            "name": rule.name,
            "intent": rule.intent,
            "applies": int(np.sum(~np.isnan(references[:, n]))),
            "references": _share(references[:, n]),
            "fits": fit[n],
            "candidates": {name: _share(made[:, n]) for name, made in replies.items()},
        }
        for n, rule in enumerate(rules)
    ]


def by_intent(
    rows: Sequence[TestRow], fitting: Sequence[bool], references: NDArray[np.float64], replies: dict[str, NDArray[np.float64]]
) -> list[dict[str, Any]]:
    """One entry an intent to which a rule that fits applies, most rows first."""
    intents = np.array([row.intent for row in rows])
    made: list[dict[str, Any]] = []
    for intent in sorted(set(intents.tolist()), key=lambda name: (-int(np.sum(intents == name)), name)):
        here = np.flatnonzero(intents == intent)
        used = np.ix_(here, np.flatnonzero(np.array(fitting, bool)))
        if not np.any(~np.isnan(references[used])):
            continue
        shares = {name: _share(table[used]) for name, table in replies.items()}
        made.append({"intent": intent, "rows": len(here), "references": _share(references[used]), "candidates": shares})
    return made


def _share(values: NDArray[np.float64]) -> float | None:
    there = values[~np.isnan(values)]
    return round(float(there.mean()), 6) if there.size else None


def _found(pattern: str, text: str) -> bool:
    return re.search(pattern, text[:LONGEST], re.IGNORECASE) is not None
