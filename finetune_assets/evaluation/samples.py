"""Replies side by side: what a person looks at before believing a number.

Rows with a tuned reply and a reference are ordered by their chrF: the best, the worst, and some drawn by a hash of the message id
from all the rest, at most one of a conversation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune_assets.assistants.settings.evaluation import Rule
from finetune_assets.dataset.tool_calls import said
from finetune_assets.evaluation import facts, text_scores
from finetune_assets.evaluation.candidates import TUNED, TestRow
from finetune_assets.evaluation.measured import Measured

EACH = 3
RANDOM = 12
LONGEST = 1_500  # characters of a text that is shown


def choose(rows: Sequence[TestRow], found: Measured, rules: Sequence[Rule]) -> dict[str, list[dict[str, Any]]]:
    """Samples `best`, `worst` and `random`; each with context, reference, and every candidate's reply, faults and sources."""
    statistics = np.array(found.frames[TUNED]["chrf"].to_list(), np.float64).reshape(len(rows), -1)
    scores = text_scores.chrf(statistics)
    by_hash = sorted(range(len(rows)), key=lambda n: hashlib.blake2b(rows[n].message_id.encode()).digest())
    scored = np.isfinite(scores) & found.outputs[TUNED].there
    by_score = sorted((n for n in by_hash if scored[n]), key=lambda n: -scores[n])
    taken: set[str] = set()
    groups = {"best": by_score, "worst": by_score[::-1], "random": by_hash}
    picked = {group: _pick(order, rows, RANDOM if group == "random" else EACH, taken) for group, order in groups.items()}

    def reply_of(name: str, n: int) -> dict[str, Any]:
        frame, judged = found.frames[name], found.outputs[name].judged
        said = frame["reply"][n]
        return {
            "reply": _clip(said) if said is not None else None,
            "missing": frame["missing"][n],
            "broken": [rule.name for m, rule in enumerate(rules) if found.fitting[m] and found.kept[name][n, m] == 0],
            "unsupported": [facts.shown(fact) for fact in judged[n].unsupported if fact[0] != "term"] if said else [],
            "sources": list(frame["sources"][n]),
        }

    def sample(n: int) -> dict[str, Any]:
        turns = [message for message in rows[n].messages if message["role"] != "system"]
        return {
            "message_id": rows[n].message_id,
            "intent": rows[n].intent,
            "tenant_id": rows[n].tenant_id,
            "context": [{"role": turn["role"], "content": _clip(said(turn))} for turn in turns],
            "reference": _clip(rows[n].reference),
            "replies": {name: reply_of(name, n) for name in found.frames},
            "chrf": round(float(scores[n]), 2) if scored[n] else None,
        }

    return {group: [sample(n) for n in chosen] for group, chosen in picked.items()}


def _pick(order: Sequence[int], rows: Sequence[TestRow], most: int, taken: set[str]) -> list[int]:
    chosen: list[int] = []
    for n in order:
        if len(chosen) == most:
            break
        if rows[n].conversation_id not in taken:
            taken.add(rows[n].conversation_id)
            chosen.append(n)
    return chosen


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … (+{len(text) - LONGEST:,})"
