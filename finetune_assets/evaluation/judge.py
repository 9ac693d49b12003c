"""A language model that says which of two replies is better: asked twice, sides swapped; an option, and no gate stands on it.

What is wrong with such judges is known (Zheng et al. 2023, arXiv:2306.05685, section 3.3: position, length and self-preference
bias), so: a verdict counts only where both orders agree, else it is a tie; the share that goes to the first place is shown; and
so is its agreement with people's ratings of the same rows, without which it is to be believed in nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_assets.dataset.tool_calls import said
from finetune_assets.evaluation.candidates import TestRow
from finetune_assets.evaluation.statistics import NOTHING, Bootstrap, Interval, share

Message = dict[str, Any]
Replies = Sequence[str | None]
"""Null where there is none."""
INSTRUCTION = (
    "You compare two replies of an assistant to the same conversation. Judge whether they help the user, are true to what was "
    "said, and are polite. Length is no merit. Answer with one character: A if reply A is better, B if B is, T for a tie."
)
_VERDICT = (re.compile(r"^\W*(A|B|T)(?:IE)?\b(?! TIE\b)"), re.compile(r"\b(T)IE\b"), re.compile(r"\b([ABT])\b"))
"""Tried in turn on capitals: the answer that comes first, a tie that is told in a sentence ("it's a tie": no A), a letter."""
ANSWER_TOKENS = 8
CASE = (
    "You check one reply of an assistant against one expectation. Answer with one character: Y if the reply does what is "
    "expected, N if it does not."
)
_HOLDS = re.compile(r"\b(?:(Y|YES|S[IÍ])|N|NO)\b")


def questions(rows: Sequence[TestRow], first: Replies, second: Replies, most: int) -> list[dict[str, Any]]:
    """For at most `most` rows whose replies differ: `row`, and `messages` in both orders (`forth`, `back`)."""
    made: list[dict[str, Any]] = []
    for n, (row, one, other) in enumerate(zip(rows, first, second, strict=True)):
        if len(made) == most:
            break
        if one and other and one.strip() != other.strip():
            made.append({"row": n, "forth": _ask(row, one, other), "back": _ask(row, other, one)})
    return made


def verdict(answer: str | None) -> str | None:
    """`A`, `B` or `T`; null for an answer that is none of them, or missing."""
    said = (answer or "").upper()
    return next((found[1] for pattern in _VERDICT if (found := pattern.search(said))), None)


def judged(rows: Sequence[TestRow], asked: Sequence[Mapping[str, Any]], answers: Sequence[Replies]) -> dict[str, Any]:
    """The report's `judge`. `answers`: (forth, back) of each question. A win is the first candidate's; ties count half."""
    scores: list[float | None] = []
    first_place: list[bool] = []
    choices: dict[str, str] = {}
    for question, (forth, back) in zip(asked, answers, strict=True):
        one, other = verdict(forth), verdict(back)
        first_place += [answer == "A" for answer in (one, other) if answer in ("A", "B")]
        if one is None or other is None:
            scores.append(None)
            continue
        score = 1.0 if (one, other) == ("A", "B") else 0.0 if (one, other) == ("B", "A") else 0.5
        scores.append(score)
        choices[rows[question["row"]].message_id] = {1.0: "first", 0.0: "second", 0.5: "tie"}[score]
    conversations = [rows[question["row"]].conversation_id for question in asked]
    rate = Bootstrap(conversations).interval(share(scores)) if asked else NOTHING
    bias = _bias(first_place)
    return {
        "asked": len(asked),
        "missing": sum(score is None for score in scores),
        "win_rate": rate.as_dict(),
        "first_place": bias.as_dict(),
        "consistent": sum(score not in (None, 0.5) for score in scores),
        "choices": choices,
    }


def case_question(messages: Sequence[Mapping[str, Any]], reply: str, expected: str) -> list[Message]:
    """What a judge is asked of a case of the standing suite."""
    asked = f"Conversation:\n{_talk(messages)}\n\nReply:\n{reply}\n\nExpected: {expected}\n\nDoes the reply do so (Y or N)?"
    return [{"role": "system", "content": CASE}, {"role": "user", "content": asked}]


def holds(answer: str | None) -> bool | None:
    """Whether the judge says so; null for an answer that is neither Y nor N, or missing."""
    found = _HOLDS.search((answer or "").upper())
    return found[1] is not None if found else None


def _bias(first_place: Sequence[bool]) -> Interval:
    return Bootstrap([str(n) for n in range(len(first_place))]).interval(share(list(first_place))) if first_place else NOTHING


def _ask(row: TestRow, a: str, b: str) -> list[Message]:
    talk = _talk(row.messages)
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": f"Conversation:\n{talk}\n\nReply A:\n{a}\n\nReply B:\n{b}\n\nBetter reply (A, B or T):"},
    ]


def _talk(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"{m['role']}: {said(m)}" for m in messages if m["role"] != "system")
