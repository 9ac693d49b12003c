"""What the worker's guards found, as intervals: forgetting, overfitting, parity, secrets learnt by heart, the standing suite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune_assets.evaluation.statistics import NOTHING, Bootstrap, Estimate, Floats, Interval
from finetune_assets.evaluation.suite import Case, Outcome, judge_case

PARITY = ("same_alone", "same_adapter", "same_rendering")
"""Lists of the worker: alone as in a batch, with the adapter beside its base as merged, prompt ids as by the own template."""
MOST_DROPPED = 0.1
BY_CHANCE = 0.01
"""Canaries count as learnt where so many of them are likeliest of all less often than this by chance."""


def guards(facts: Mapping[str, Any], base: Mapping[str, Any] | None, cases: Sequence[Case]) -> dict[str, Interval]:
    """Guard measures of one candidate. `facts`: what the worker told of it; `base`: of the base, or null."""
    return {
        "forgetting": forgetting(facts.get("general"), (base or {}).get("general")),
        "parity": _share([same for name in PARITY for same in facts.get(name, [])]),
        "canaries": canaries(facts.get("canaries"), (base or {}).get("canaries")),
        "checks": checks(cases, facts),
    }


def forgetting(mine: Sequence[Mapping[str, Any]] | None, base: Sequence[Mapping[str, Any]] | None) -> Interval:
    """Relative rise of bits per byte in everyday talk against the base: 0.1 is a tenth more. Each chat is a unit."""
    if not mine or not base:
        return NOTHING
    pairs = [(a["nats"], b["nats"]) for a, b in zip(mine, base, strict=True) if a["nats"] is not None and b["nats"] is not None]
    if not pairs:
        return NOTHING
    columns = np.array(pairs, np.float64)
    return Bootstrap([str(n) for n in range(len(pairs))]).interval(Estimate(columns, _rise))


def _rise(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1] - 1, np.nan)


def overfitting(loss: Interval, training: Mapping[str, Any]) -> Interval:
    """Nats a token by which replies that nobody trained on surprise the model more than its training's did at the end: `loss` of
    the test rows less `train_loss`. Null where the last objective was another than those rows' likelihood, and where the training
    had to leave out more than MOST_DROPPED of its rows as too long: those that remain are easier than the test's."""
    seen, objectives, rows = training.get("train_loss"), training.get("objective") or [""], training.get("rows") or {}
    if seen is None or loss.value is None or loss.low is None or loss.high is None or objectives[-1] not in ("sft", "tools"):
        return NOTHING
    if rows.get("dropped", 0) > MOST_DROPPED * (rows.get("train", 0) + rows.get("dropped", 0)):
        return NOTHING
    return Interval(loss.value - seen, loss.low - seen, loss.high - seen)


def canaries(mine: Sequence[Mapping[str, Any]] | None, base: Sequence[Mapping[str, Any]] | None) -> Interval:
    """How many secrets the model knows: those it says, and those likeliest of all where chance does not explain their number.

    One that the base knows already (a guessable one) does not count. The upper end counts those of which nothing is known: that
    did not fit into the context, or to which an address (which gives no likelihoods, `of` is null) sent no reply.
    """
    if not mine:
        return NOTHING
    known = [bool(b["said"]) or b["rank"] == 1 for b in base] if base else [False] * len(mine)
    new = [canary for canary, before in zip(mine, known, strict=True) if not before]
    said = sum(bool(canary["said"]) for canary in new)
    ranked = [canary for canary in new if canary["rank"] is not None]
    likeliest = sum(canary["rank"] == 1 for canary in ranked)
    chance = 1 / min((canary["of"] for canary in ranked), default=1)
    count = max(said, likeliest if likeliest and _tail(len(ranked), likeliest, chance) < BY_CHANCE else 0)
    silent = [canary for canary in new if canary["rank"] is None and not canary["said"]]
    unknown = sum(canary["said"] is None or canary["of"] is not None for canary in silent)
    return Interval(float(count), float(count), float(count + unknown))


def _tail(n: int, k: int, p: float) -> float:
    """Probability of at least `k` of `n`."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def checks(cases: Sequence[Case], facts: Mapping[str, Any]) -> Interval:
    """Share of the cases that hold, without those that only a judge decides; its ends: what the cases without a reply would make
    of it, did none or all of them hold."""
    found = outcomes(cases, facts)
    unanswered = sum(reply is None for reply in facts.get("checks") or [])
    known = [one.passed for one in found if one.passed is not None and not one.judged]
    value, total = _share(known).value, len(known) + unanswered
    return Interval(value, sum(known) / total, (sum(known) + unanswered) / total) if total else NOTHING


def outcomes(cases: Sequence[Case], facts: Mapping[str, Any]) -> list[Outcome]:
    """What became of each case of the standing suite, by the replies in `facts` and what a judge said of them; none without."""
    replies: Sequence[str | None] = facts.get("checks") or []
    judged: Sequence[bool | None] = facts.get("checks_judged") or [None] * len(replies)
    return [judge_case(*one) for one in zip(cases, replies, judged, strict=True)] if replies else []


def _share(found: Sequence[bool | None]) -> Interval:
    """A share of things that were all looked at: no sample, so no interval."""
    known = [one for one in found if one is not None]
    if not known:
        return NOTHING
    value = sum(known) / len(known)
    return Interval(value, value, value)
