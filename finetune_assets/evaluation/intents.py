"""On which intents a model can be relied on: its share of accurate replies to each, and how far it is from the base there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_assets.evaluation.candidates import BASE, TUNED, TestRow
from finetune_assets.evaluation.measured import Measured
from finetune_assets.evaluation.statistics import holm, p_value

MEASURE = "accuracy"
MOST = 20
"""Intents that are shown, most rows first."""


def reliability(rows: Sequence[TestRow], found: Measured, names: Sequence[str]) -> list[dict[str, Any]]:
    """One entry an intent: rows, conversations, MEASURE of each candidate, and tuned minus base where both are there."""
    intents = np.array([row.intent for row in rows])
    counts = {str(name): int(np.sum(intents == name)) for name in set(intents.tolist())}
    made: list[dict[str, Any]] = []
    for intent in sorted(counts, key=lambda name: (-counts[name], name))[:MOST]:
        here = intents == intent
        entry: dict[str, Any] = {
            "intent": intent,
            "rows": counts[intent],
            "conversations": len({row.conversation_id for row in rows if row.intent == intent}),
            "measure": MEASURE,
            "candidates": {name: found.within(name, MEASURE, here).as_dict() for name in names},
        }
        made.append(entry)
    if BASE in names and TUNED in names:
        _compare(made, intents, found)
    return made


def _compare(made: Sequence[dict[str, Any]], intents: NDArray[Any], found: Measured) -> None:
    """Adds tuned minus base, with Holm's correction over the intents: with twenty of them one differs by chance. One of few
    conversations has no p, and takes no part in it."""
    differences = {one["intent"]: found.compare(TUNED, BASE, MEASURE, intents == one["intent"]) for one in made}
    adjusted = holm({intent: p_value(difference) for intent, difference in differences.items()})
    for one in made:
        one["tuned_vs_base"] = {**differences[one["intent"]].as_dict(), "p": adjusted[one["intent"]]}
