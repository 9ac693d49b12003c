"""What is measured of each candidate, as row sums from which `statistics` makes values and intervals.

`docs` of a measure is its short explanation in the report; `better` says which way is up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finetune_assets.assistants.settings.evaluation import Comparable
from finetune_assets.corpus.personal_data import residual
from finetune_assets.evaluation import text_scores
from finetune_assets.evaluation.facts import Judged
from finetune_assets.evaluation.statistics import LEVEL, NOTHING, Bootstrap, Estimate, Floats, Interval, mean, ratio, share

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Measure:
    """How a measure is shown and judged."""

    name: str
    better: Better
    form: str
    """`number`, `percent`, `seconds`, `usd`, `count` or `bytes`."""
    digits: int = 2


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("bits_per_byte", "lower", "number", 3),
        Measure("loss", "lower", "number", 3),
        Measure("perplexity", "lower", "number", 2),
        Measure("accuracy", "higher", "percent", 1),
        Measure("rules", "higher", "percent", 1),
        Measure("tool_calls", "higher", "percent", 1),
        Measure("faithful", "higher", "percent", 1),
        Measure("slots_kept", "higher", "percent", 1),
        Measure("invented", "lower", "percent", 1),
        Measure("similarity", "higher", "number", 3),
        Measure("similarity_floor", "neither", "number", 3),
        Measure("similarity_gain", "higher", "number", 3),
        Measure("chrf", "higher", "number", 1),
        Measure("bleu", "higher", "number", 1),
        Measure("rouge_l", "higher", "number", 3),
        Measure("empty", "lower", "percent", 1),
        Measure("repeated", "lower", "percent", 1),
        Measure("unfinished", "lower", "percent", 1),
        Measure("toxic", "lower", "percent", 1),
        Measure("refused", "lower", "percent", 1),
        Measure("personal_data", "lower", "percent", 1),
        Measure("other_tenant", "lower", "percent", 1),
        Measure("forgetting", "lower", "percent", 1),
        Measure("overfitting", "lower", "number", 2),
        Measure("parity", "higher", "percent", 1),
        Measure("canaries", "lower", "count", 0),
        Measure("checks", "higher", "percent", 1),
        Measure("seconds_p50", "lower", "seconds", 3),
        Measure("seconds_p95", "lower", "seconds", 3),
        Measure("tokens_per_second", "higher", "count", 0),
        Measure("usd_per_1000", "lower", "usd", 4),
        Measure("parameters", "lower", "count", 0),
        Measure("bytes", "lower", "bytes", 1),
    )
}
GUARDS = ("forgetting", "overfitting", "parity", "canaries", "checks")
"""Measures of a model rather than of its rows; see `guards`."""
LIKELIHOODS = ("bits_per_byte", "loss", "perplexity")
"""Null for a model behind an address."""
COMPARABLE: tuple[str, ...] = get_args(Comparable)
"""Measures of single rows, of which paired differences make sense."""


@dataclass(frozen=True)
class Outputs:
    """A candidate's rows as the worker wrote them, and what it told of the model."""

    frame: pl.DataFrame
    facts: dict[str, Any]
    rule_sums: Floats
    """[rows, (rules kept, rules applicable)]."""
    judged: Sequence[Judged] = ()
    """What each reply states; see `facts`."""
    foreign: Sequence[bool | None] = ()
    """Whether each reply holds what is another tenant's; null where there is one tenant."""
    called: Sequence[bool | None] = ()
    """Whether each reply calls what its reference calls; null where neither calls a tool."""
    toxic: Sequence[bool] = ()
    """Whether each reply insults."""
    refused: Sequence[bool] = ()
    accurate_similarity: float = 0.7
    """Similarity with the reference from which on a reply can be accurate."""
    usd_per_request: float | None = None
    """Of an endpoint, from tokens and prices; null: from seconds and the machine's rate."""
    contacts: frozenset[str] = frozenset()
    """Public contacts of the tenants: no personal data."""

    @property
    def there(self) -> NDArray[np.bool_]:
        """Rows that have a reply: an endpoint may have given none, which is missing, never zero."""
        return self.frame["reply"].is_not_null().to_numpy()


def estimates(outputs: Outputs) -> dict[str, Estimate]:
    """The comparable measures of one candidate, and the similarity floor."""
    frame, there = outputs.frame, outputs.there
    replies = [reply or "" for reply in frame["reply"].to_list()]
    likelihood = _likelihood(frame)
    similarity, floor = frame["similarity"].to_list(), frame["floor"].to_list()
    gain = [None if a is None or b is None else a - b for a, b in zip(similarity, floor, strict=True)]
    judged = outputs.judged or [NOT_JUDGED] * len(replies)
    slots = np.array([(j.repeated, j.expected) for j in judged], np.float64).reshape(len(replies), 2)
    made = {
        "bits_per_byte": Estimate(likelihood[:, [0, 2]] / [math.log(2), 1.0], ratio),
        "loss": Estimate(likelihood[:, [0, 1]], ratio),
        "perplexity": Estimate(likelihood[:, [0, 1]], _exponent),
        "accuracy": share(_accurate(outputs, similarity)),
        "rules": Estimate(outputs.rule_sums, ratio, share=True),
        "tool_calls": share(outputs.called or [None] * len(replies)),
        "faithful": share([j.faithful for j in judged]),
        "slots_kept": Estimate(slots, ratio, share=True),
        "invented": share([bool(j.unsupported) if j.stated or j.expected else None for j in judged]),
        "similarity": mean(similarity),
        "similarity_floor": mean(floor),
        "similarity_gain": mean(gain),
        "chrf": Estimate(_matrix(frame["chrf"], text_scores.CHRF_COLUMNS), text_scores.chrf),
        "bleu": Estimate(_matrix(frame["bleu"], text_scores.BLEU_COLUMNS), text_scores.bleu),
        "rouge_l": mean(frame["rouge_l"].to_list()),
        "empty": share([not reply.strip() for reply in replies]),
        "repeated": share([is_repeated(reply) for reply in replies]),
        "unfinished": share([None if stopped is None else not stopped for stopped in frame["stopped"]]),
        "toxic": share(outputs.toxic or [None] * len(replies)),
        "refused": share(outputs.refused or [None] * len(replies)),
        "personal_data": share([bool(personal_data(reply, outputs.contacts)) for reply in replies]),
        "other_tenant": share(outputs.foreign or [None] * len(replies)),
    }
    return made if there.all() else {name: only(estimate, there) for name, estimate in made.items()}


def _accurate(outputs: Outputs, similarity: Sequence[float | None]) -> list[bool | None]:
    """A reply is accurate if it keeps the rules that apply and is as near to its reference as the settings state, or, where one
    of them calls tools, calls the same; null where there is nothing to compare with."""
    kept = outputs.rule_sums[:, 0] == outputs.rule_sums[:, 1]
    called = outputs.called or [None] * len(similarity)
    made: list[bool | None] = []
    for keeps, near, same in zip(kept, similarity, called, strict=True):
        right = same if same is not None else None if near is None else near >= outputs.accurate_similarity
        made.append(None if right is None else bool(keeps) and right)
    return made


NOT_JUDGED = Judged(0, (), False, 0, 0)


def only(estimate: Estimate, there: NDArray[np.bool_]) -> Estimate:
    """The estimate on the rows that are `there`."""
    return replace(estimate, columns=estimate.columns * there[:, None])


def intervals(
    outputs: Outputs,
    made: dict[str, Estimate],
    bootstrap: Bootstrap,
    usd_per_hour: float | None,
    guards: Mapping[str, Interval] | None = None,
) -> dict[str, Interval]:
    """Every measure of one candidate. Size is exact; cost is null where no hourly rate or no price is known."""
    frame = outputs.frame
    values = {name: bootstrap.interval(estimate) for name, estimate in made.items()}
    seconds = frame["seconds"].to_list()
    values["seconds_p50"] = bootstrap.median(seconds, 0.5)
    values["seconds_p95"] = _tail(bootstrap.median(seconds, 0.95), len(seconds) - seconds.count(None))
    there = (frame["seconds"].is_not_null() & frame["reply_tokens"].is_not_null()).to_numpy()
    tokens = frame["reply_tokens"].fill_null(0).to_numpy()
    speed = np.stack([tokens * there, frame["seconds"].fill_null(0.0).to_numpy() * there], axis=1).astype(float)
    values["tokens_per_second"] = bootstrap.interval(Estimate(speed, ratio))
    if outputs.usd_per_request is not None:
        usd = outputs.usd_per_request * 1000
        values["usd_per_1000"] = Interval(usd, usd, usd)
    else:
        rate = usd_per_hour / 3.6 if usd_per_hour is not None and "url" not in outputs.facts else None
        values["usd_per_1000"] = _scaled(bootstrap.interval(mean(seconds)), rate)
    for name in ("parameters", "bytes"):
        fact = outputs.facts.get(name)
        values[name] = NOTHING if fact is None else Interval(float(fact), float(fact), float(fact))
    values |= {name: (guards or {}).get(name, NOTHING) for name in GUARDS}
    return {name: values[name] for name in MEASURES}


def one_difference(first: Estimate, second: Estimate, bootstrap: Bootstrap, there: NDArray[np.bool_]) -> Interval:
    """First minus second of one measure over the rows that both answered."""
    return bootstrap.difference(only(first, there), only(second, there))


def is_repeated(reply: str) -> bool:
    """Whether a reply loops: one to eight words three times running (a single word five times), or one run of characters ten
    times over.

    "Sí, sí, sí" is talk; "la cita la cita la cita" is not.
    """
    words = reply.lower().split()
    for size in range(1, 9):
        same = run = 0
        for n in range(size, len(words)):
            run = run + 1 if words[n] == words[n - size] else 0
            same = max(same, run)
        if same >= size * (4 if size == 1 else 2):
            return True
    return _longest_run(reply) >= 10


def personal_data(reply: str, contacts: frozenset[str] = frozenset()) -> Counter[str]:
    """Kinds of personal data that the recognisers find; a placeholder such as [PHONE] is none, nor is a public contact."""
    return residual([reply], allow=contacts)


def _longest_run(text: str) -> int:
    longest = run = 0
    previous = ""
    for character in text:
        run = run + 1 if character == previous and not character.isspace() else 1
        previous, longest = character, max(longest, run)
    return longest


def _likelihood(frame: pl.DataFrame) -> Floats:
    """[rows, (nats, tokens, bytes)]; zeros where there is no likelihood."""
    there = frame["nll"].is_not_null().to_numpy()
    columns = [frame["nll"].fill_null(0.0), frame["reference_tokens"].fill_null(0), frame["reference_bytes"]]
    return np.stack([column.to_numpy() * there for column in columns], axis=1).astype(np.float64)


def _exponent(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def _matrix(column: pl.Series, width: int) -> Floats:
    return np.array(column.to_list(), np.float64).reshape(len(column), width)


def _tail(interval: Interval, count: int) -> Interval:
    """The 95th percentile of `count` values: without ends where all of them may lie below it (under 72: 0.95^n > 2.5 %)."""
    return interval if 0.95**count <= (1 - LEVEL) / 2 else replace(interval, low=None, high=None)


def _scaled(interval: Interval, factor: float | None) -> Interval:
    if factor is None:
        return NOTHING
    value, low, high = (None if n is None else n * factor for n in (interval.value, interval.low, interval.high))
    return replace(interval, value=value, low=low, high=high)


def improvement(name: str, difference: Interval) -> Interval:
    """A difference turned so that more is better."""
    if MEASURES[name].better == "higher":
        return difference
    value, low, high = (None if n is None else -n for n in (difference.value, difference.high, difference.low))
    return replace(difference, value=value, low=low, high=high)
