"""Was it worth it? What each candidate costs, when it pays for itself, and which one to use: prompt, examples, retrieval, tuning.

The recommendation climbs from the simplest option to the next only where that one is better by more than chance, and by at least
a hundredth (WORTH), in the assistant's chosen measure, so it turns round when the numbers do. Under `MIN_CONVERSATIONS` it
waits, as the gates do: the step is null and the decision not settled. What leads is recommended only where the gates that can
be measured on it pass, or none can (then the report says so). Prices are those of the settings, with their day; seconds are
measured, and are those in which a machine is busy: one that is always on costs its whole month (`always_on`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_assets.assistants.settings.evaluation import EndpointSettings
from finetune_assets.evaluation.candidates import BASE, FEW_SHOT, ORDER, RAG, TUNED, TUNED_RAG
from finetune_assets.evaluation.measures import improvement
from finetune_assets.evaluation.statistics import Interval

OPTIONS = (BASE, FEW_SHOT, RAG, TUNED, TUNED_RAG)
"""From the simplest to run and keep, to the most laborious."""
WORTH = 0.01
"""Least relative improvement that is worth another option's trouble, however sure it is."""
FALLBACK = ("similarity_gain", "chrf")
"""Measures that decide where an option has no likelihood."""
SMALL = 1e9
"""Parameters under which a model that gains nothing from its prompt is said to be too small for it: examples hardly help models
of 0.1 to 1.3 billion (Brown et al. 2020, arXiv:2005.14165, figure 1.2)."""
HOURS_A_MONTH = 365.25 * 24 / 12
Compare = Callable[[str, str, str], Interval]
"""(first, second, measure) -> first minus second."""
Judge = Callable[[str], Mapping[str, Any] | None]
"""Option -> `verdict` of the gates and their `reasons`; null where no gate can be measured on it."""


@dataclass(frozen=True)
class Money:
    """What is known of prices and volume."""

    training_usd: float | None
    requests_per_month: int | None
    traffic_from: str
    """`settings`, `corpus` or empty."""


def usd_per_request(endpoint: EndpointSettings, prompt_tokens: float | None, reply_tokens: float | None) -> float | None:
    """Mean tokens of a request times the prices of the settings; null where a price is missing, or no tokens were told."""
    if prompt_tokens is None or reply_tokens is None:
        return None
    if endpoint.usd_per_million_input is None or endpoint.usd_per_million_output is None:
        return None
    return (prompt_tokens * endpoint.usd_per_million_input + reply_tokens * endpoint.usd_per_million_output) / 1e6


def decide(
    values: Mapping[str, Mapping[str, Interval]],
    compare: Compare,
    measure: str,
    judge: Judge,
    money: Money,
    knowledge: Compare | None = None,
) -> dict[str, Any]:
    """The report's `decision`. `values`: every measure of each candidate, its cost among them; `measure`: what decides;
    `knowledge`: `compare` on the rows that need more than their conversation, where retrieval is judged (default: on all)."""
    names = list(values)
    costs = {name: values[name]["usd_per_1000"].value for name in names}
    there = [name for name in OPTIONS if name in names]
    prompted = [_gain_over(compare, name, BASE, measure, values) for name in (FEW_SHOT, RAG) if name in there]
    steps: list[dict[str, Any]] = []
    pick = there[0]
    for option in there[1:]:
        found, used = _gain(compare, option, pick, measure)
        before = values[pick][used].value
        better = _is_better(found, before)
        steps.append({"from": pick, "to": option, "measure": used, "gain": found.as_dict(), "better": better})
        if better:
            pick = option
    judged, looked = judge(pick), knowledge or compare
    return {
        "recommendation": pick,
        "settled": all(step["better"] is not None for step in steps),
        "judged": judged,
        "ready": None if judged is None else judged["verdict"] == "serve",
        "measure": measure,
        "steps": steps,
        "prompting_helps": _helps(prompted),
        "retrieval_helps": {name: _helps([_gain_over(looked, name, plain, measure, values)]) for name, plain in _with(there)},
        "monthly": {name: _monthly(costs.get(name), money.requests_per_month) for name in names},
        "requests_per_month": money.requests_per_month,
        "traffic_from": money.traffic_from,
        "training_usd": money.training_usd,
        "break_even": {
            name: break_even(money.training_usd, costs.get(name), costs.get(TUNED))
            for name in names
            if name not in (TUNED, TUNED_RAG, BASE)
        },
    }


def break_even(training_usd: float | None, other_per_1000: float | None, tuned_per_1000: float | None) -> int | None:
    """Requests after which the training is paid back by the cheaper replies; null where they are not cheaper, or unknown."""
    if training_usd is None or other_per_1000 is None or tuned_per_1000 is None or other_per_1000 <= tuned_per_1000:
        return None
    return max(1, round(training_usd / (other_per_1000 - tuned_per_1000) * 1000))


def always_on(usd_per_hour: float | None) -> float | None:
    """US dollars a month of a machine that never rests; null without a rate."""
    return None if usd_per_hour is None else usd_per_hour * HOURS_A_MONTH


def order(names: Sequence[str]) -> list[str]:
    """Candidates as the report shows them: the project's own, then endpoints."""
    return [*(name for name in ORDER if name in names), *(name for name in names if name not in ORDER)]


def _gain(compare: Compare, option: str, pick: str, measure: str) -> tuple[Interval, str]:
    for used in (measure, *FALLBACK):
        found = improvement(used, compare(option, pick, used))
        if found.value is not None:
            return found, used
    return Interval(None, None, None), measure


def _gain_over(
    compare: Compare, option: str, other: str, measure: str, values: Mapping[str, Mapping[str, Interval]]
) -> tuple[Interval, float]:
    """By how much an option is better, and what would be worth it."""
    found, used = _gain(compare, option, other, measure)
    return found, WORTH * abs(values[other][used].value or 0.0)


def _helps(gains: Sequence[tuple[Interval, float]]) -> bool | None:
    """Whether any of them is better by what is worth it; null where that is neither shown nor ruled out."""
    if not all(gain.enough for gain, _worth in gains):
        return None
    if any(gain.low is not None and gain.value is not None and gain.low > 0 and gain.value >= worth for gain, worth in gains):
        return True
    return False if all(gain.high is not None and gain.high < worth for gain, worth in gains) else None


def _is_better(gain: Interval, before: float | None) -> bool | None:
    """Null where too few conversations compare them."""
    if not gain.enough:
        return None
    if gain.low is None or gain.value is None:
        return False
    return gain.low > 0 and gain.value >= WORTH * abs(before or 0.0)


def _with(there: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, plain) for name, plain in ((RAG, BASE), (TUNED_RAG, TUNED)) if name in there and plain in there]


def _monthly(per_1000: float | None, requests: int | None) -> float | None:
    return None if per_1000 is None or requests is None else round(per_1000 * requests / 1000, 4)
