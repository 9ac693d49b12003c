"""What ratings of pairs say: who wins, how surely, whether raters agree, whether a side is favoured.

win rate       wins and half of the ties (pairs where both are bad count as ties), interval clustered by conversation
alpha          Krippendorff (2011), Computing Krippendorff's alpha-reliability, nominal: 1 agreement, 0 chance
position bias  share of decided pairs that went to the left side, with its Wilson interval
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune_assets.evaluation.human.book import Rating
from finetune_assets.evaluation.human.study import Study, pairs_needed
from finetune_assets.evaluation.statistics import NOTHING, Bootstrap, Estimate, Interval, ratio, share

OPEN = ("tie", "both_bad")


@dataclass(frozen=True)
class Result:
    """Of a study of pairs."""

    rated: int
    raters: int
    counts: dict[str, int]
    win_rate: Interval
    alpha: float | None
    """Null where no item has two ratings."""
    left: Interval
    pairs_needed: int | None
    """To tell the seen win rate from one half with 80 % power; null at one half."""


def evaluate(study: Study, rated: Sequence[Rating]) -> Result:
    """The result for the study's first candidate. Items that two raters judged count once, by the mean of their scores."""
    first = study.candidates[0]
    conversations = {item.item: item.conversation_id for item in study.items}
    scores: dict[str, list[float]] = {}
    for rating in rated:
        scores.setdefault(rating.item, []).append(0.5 if rating.choice in OPEN else float(rating.choice == first))
    items = sorted(scores)
    rate = NOTHING
    if items:
        columns = np.array([[sum(scores[item]) / len(scores[item]), 1.0] for item in items])
        bootstrap = Bootstrap([conversations[item] for item in items])
        rate = bootstrap.interval(Estimate(columns, ratio, share=True))
    decided = [rating for rating in rated if rating.choice not in OPEN]
    left = NOTHING
    if decided:
        left = Bootstrap([str(n) for n in range(len(decided))]).interval(share([r.choice == r.left for r in decided]))
    off = rate.value is not None and abs(rate.value - 0.5) > 1e-9
    return Result(
        rated=len(rated),
        raters=len({rating.rater for rating in rated}),
        counts=dict(Counter(rating.choice for rating in rated)),
        win_rate=rate,
        alpha=krippendorff([[rating.choice for rating in rated if rating.item == item] for item in items]),
        left=left,
        pairs_needed=pairs_needed(max(rate.value, 1 - rate.value)) if off and rate.value is not None else None,
    )


def choices(study: Study, rated: Sequence[Rating]) -> dict[str, str]:
    """Message id -> `first`, `second` or `tie`, of the items on which all raters agree."""
    messages = {item.item: item.message_id for item in study.items}
    said: dict[str, set[str]] = {}
    for rating in rated:
        won = "tie" if rating.choice in OPEN else "first" if rating.choice == study.candidates[0] else "second"
        said.setdefault(messages[rating.item], set()).add(won)
    return {message: next(iter(won)) for message, won in said.items() if len(won) == 1}


def krippendorff(units: Sequence[Sequence[str]]) -> float | None:
    """Nominal alpha of the values that several raters gave each unit; null where no unit has two, or there is one value only."""
    together: Counter[tuple[str, str]] = Counter()
    for values in units:
        if len(values) > 1:
            for n, a in enumerate(values):
                for m, b in enumerate(values):
                    if n != m:
                        together[a, b] += 1 / (len(values) - 1)  # pyright: ignore[reportArgumentType]
    totals: dict[str, float] = {}
    for (a, _b), count in together.items():
        totals[a] = totals.get(a, 0.0) + count
    n = sum(totals.values())
    expected = n * n - sum(total * total for total in totals.values())
    if n <= 1 or expected == 0:
        return None
    observed = sum(count for (a, b), count in together.items() if a != b)
    return 1 - (n - 1) * observed / expected


def agreement(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, Any]:
    """`agreement`: of the items that two judges share (`agreement_rows`), the share on which they say the same, null without any;
    its interval, and Krippendorff's alpha, which allows for chance (`agreement_alpha`)."""
    both = [item for item in one if item in other]
    found = Bootstrap(both).interval(share([one[item] == other[item] for item in both])) if both else NOTHING
    alpha = krippendorff([(one[item], other[item]) for item in both])
    interval = {"agreement_low": found.low, "agreement_high": found.high, "agreement_alpha": alpha}
    return {"agreement": found.value, "agreement_rows": len(both), **interval}
