"""Intervals by a paired bootstrap over conversations.

Replies of one conversation are alike, so the conversation is the unit that is drawn, not the row. All candidates and measures
share the same draws: an interval of a difference is that of the paired differences. A measure is a function of column sums, so
ratios (nats per byte) and corpus scores (BLEU) are computed anew in every draw.

    Efron (1987), Better bootstrap confidence intervals, JASA 82: BCa, with the jackknife over conversations for the acceleration.
    Hesterberg (2015), What teachers should know about the bootstrap, The American Statistician 69, section 4.3: tails widened
                to those of a t-interval, without which such intervals are too narrow below some hundred conversations.
    Wilson (1927), with the effective sample size of Korn & Graubard (1998): shares, where a bootstrap of no event says [0, 0].
    Tango (1998), Equivalence test and confidence interval for the difference in proportions for the paired-sample design,
                Statistics in Medicine 17: differences of shares, with the effective sample size that clustering leaves. A
                bootstrap of pairs that all agree says [0, 0], though the next pair may not.
    Holm (1979), A simple sequentially rejective multiple test procedure: for tables of differences, where each is looked at.
    Cameron, Gelbach & Miller (2008): below some twenty clusters such intervals are too narrow; `MIN_CONVERSATIONS` makes the
                gates, p-values and the recommendation wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Function = Callable[[Floats], Floats]
RESAMPLES = 2_000
LEVEL = 0.95
MIN_CONVERSATIONS = 20
_NORMAL = NormalDist()
POWERED = 1 + _NORMAL.inv_cdf(0.8) / _NORMAL.inv_cdf((1 + LEVEL) / 2)
"""Widths of half an interval by which a value must be off a limit, to be told from it with 80 % power: 1.43."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; all null where it cannot be told; its ends where a few conversations show no spread."""

    value: float | None
    low: float | None
    high: float | None
    conversations: int | None = field(default=None, compare=False)
    """That it stands on; null where they are not its unit."""

    @property
    def enough(self) -> bool:
        """Whether something may be decided on it."""
        return self.conversations is None or self.conversations >= MIN_CONVERSATIONS

    def as_dict(self) -> dict[str, float | None]:
        """For report.json, rounded to seven significant digits."""
        return {"value": _rounded(self.value), "low": _rounded(self.low), "high": _rounded(self.high)}


NOTHING = Interval(None, None, None)


@dataclass(frozen=True)
class Estimate:
    """A measure of one candidate: `columns` [rows, k], and a function of their sums, [..., k] -> [...]."""

    columns: Floats
    function: Function
    share: bool = False
    """The first column counts events, the second one chances: gets a Wilson interval."""


def ratio(sums: Floats) -> Floats:
    """First column over the second; NaN where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def mean(values: Sequence[float | None]) -> Estimate:
    """Mean of the values that are there."""
    return Estimate(_pairs(values), ratio)


def share(values: Sequence[bool | float | None]) -> Estimate:
    """Share of true among those that are there."""
    return Estimate(_pairs(values), ratio, share=True)


def _pairs(values: Sequence[float | None]) -> Floats:
    array = np.array([np.nan if value is None else float(value) for value in values], np.float64)
    there = ~np.isnan(array)
    return np.stack([np.where(there, array, 0.0), there.astype(np.float64)], axis=1)


class Bootstrap:
    """Draws over conversations, made once and shared by everything that is compared."""

    def __init__(self, conversations: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> None:
        """`conversations`: id of each row's conversation."""
        names = sorted(set(conversations))
        place = {name: n for n, name in enumerate(names)}
        self.cluster = np.array([place[name] for name in conversations], np.int64)
        self.count = len(names)
        generator = np.random.default_rng(seed)
        shares = np.full(max(self.count, 1), 1 / max(self.count, 1))
        self.weights = generator.multinomial(self.count, shares, size=resamples).astype(np.float64)

    def sums(self, columns: Floats) -> Floats:
        """Column sums of each conversation, [conversations, k]."""
        sums = np.zeros((self.count, columns.shape[1]))
        np.add.at(sums, self.cluster, columns)
        return sums

    def interval(self, estimate: Estimate) -> Interval:
        """Value and 95 % interval of a measure."""
        sums = self.sums(estimate.columns)
        if estimate.share:
            return _wilson(sums)
        total, here = sums.sum(axis=0), sums.any(axis=1)
        without = estimate.function(total[None, :] - sums[here])
        return _bca(float(estimate.function(total)), estimate.function(self.weights @ sums), without)

    def difference(self, first: Estimate, second: Estimate) -> Interval:
        """First minus second, in the same draws; of shares, Tango's interval."""
        if first.share and second.share:
            return self._of_shares(first.columns, second.columns)
        a, b = self.sums(first.columns), self.sums(second.columns)
        point = _minus(first, a.sum(axis=0), second, b.sum(axis=0))
        draws = _minus(first, self.weights @ a, second, self.weights @ b)
        here = a.any(axis=1) & b.any(axis=1)
        without = _minus(first, a.sum(axis=0)[None, :] - a[here], second, b.sum(axis=0)[None, :] - b[here])
        return _bca(float(point), draws, without)

    def _of_shares(self, first: Floats, second: Floats) -> Interval:
        """Tango's interval on the pairs that clustering leaves: rows × their variance as if independent / that by conversations,
        at most the rows; one a conversation where nothing differs.

        The variances are those of the linearised difference of two ratios, so a row may have more chances than one, or none.
        """
        if not (first[:, 1].any() and second[:, 1].any()):
            return NOTHING
        (one, n), (other, m) = first.sum(axis=0), second.sum(axis=0)
        difference = float(one / n - other / m)
        off = (first[:, 0] - one / n * first[:, 1]) / n - (second[:, 0] - other / m * second[:, 1]) / m
        rows = min(int(np.sum(columns[:, 1] > 0)) for columns in (first, second))
        here = min(int(np.sum(self.sums(columns)[:, 1] > 0)) for columns in (first, second))
        alone = float(np.sum(off**2))
        variance = float(np.sum(self.sums(off[:, None]) ** 2)) * here / max(here - 1, 1)
        pairs = min(float(rows), max(rows * alone / variance, 1.0)) if variance > 1e-12 / rows**2 else float(here)
        discordant = min(max(variance * pairs + difference**2, abs(difference)), 1.0)
        low, high = _tango(difference, discordant, pairs, _t(here - 1))
        return Interval(difference, low, high, here)

    def median(self, values: Sequence[float | None], quantile: float = 0.5) -> Interval:
        """A quantile of the values that are there, each its own unit, with a percentile interval."""
        there = np.array([value for value in values if value is not None], np.float64)
        if there.size == 0:
            return NOTHING
        draws = np.random.default_rng(0).integers(0, there.size, size=(RESAMPLES, there.size))
        low, high = np.quantile(np.quantile(there[draws], quantile, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(np.quantile(there, quantile)), float(low), float(high))


def _minus(first: Estimate, a: Floats, second: Estimate, b: Floats) -> Floats:
    return first.function(a) - second.function(b)


def _tango(difference: float, discordant: float, pairs: float, z: float) -> tuple[float, float]:
    """Ends where the score statistic of the difference is `z`. `discordant`: share of pairs that differ."""
    against = (discordant - difference) / 2

    def beyond(limit: float) -> bool:
        """Whether a difference of `limit` is rejected; its variance is that of the likeliest shares that differ by it."""
        b = (2 - difference) * limit - discordant
        fewer = (math.sqrt(max(b * b + 8 * against * limit * (1 - limit), 0.0)) - b) / 4
        return abs(difference - limit) > z * math.sqrt(max(2 * fewer + limit * (1 - limit), 0.0) / pairs)

    def end(far: float) -> float:
        near = difference
        for _ in range(40):
            middle = (near + far) / 2
            near, far = (near, middle) if beyond(middle) else (middle, far)
        return near

    return end(-1.0), end(1.0)


def _bca(point: float, draws: Floats, without: Floats) -> Interval:
    """Bias-corrected and accelerated percentile interval. `without`: the value without each conversation that it stands on.

    Draws without spread say that a few conversations agree, not that all others would: then there are no ends, but
    for values that are equal row by row.
    """
    if not math.isfinite(point):
        return NOTHING
    count = without.size
    draws, without = np.sort(draws[np.isfinite(draws)]), without[np.isfinite(without)]
    spread = 1e-9 * max(1.0, abs(point))
    if draws.size == 0 or draws[-1] - draws[0] <= spread:
        end = point if count >= MIN_CONVERSATIONS or point == 0 else None
        return Interval(point, end, end, count)
    below = (np.sum(draws < point - spread / 1e3) + np.sum(draws <= point + spread / 1e3)) / 2 / draws.size
    bias = _NORMAL.inv_cdf(min(max(float(below), 1e-4), 1 - 1e-4))
    away = without.mean() - without if without.size else np.zeros(1)
    scale = float(np.sum(away**2)) ** 1.5
    acceleration = float(np.sum(away**3)) / (6 * scale) if scale > 0 else 0.0
    ends: list[float] = []
    wide = math.sqrt(without.size / max(without.size - 1, 1)) * _t(without.size - 1)
    for tail in (-wide, wide):
        z = bias + tail
        corrected = bias + z / max(1 - acceleration * z, 0.05)
        ends.append(float(np.quantile(draws, _NORMAL.cdf(corrected))))
    return Interval(point, min(ends), max(ends), count)


@lru_cache(maxsize=64)
def _t(freedom: int) -> float:
    """Quantile of the t distribution at the end of the interval: exact for 1 and 2, else by Hill's expansion (1970, CACM 13,
    algorithm 396)."""
    z, n = _NORMAL.inv_cdf((1 + LEVEL) / 2), max(freedom, 1)
    if n == 1:
        return math.tan(math.pi * LEVEL / 2)
    if n == 2:
        return LEVEL * math.sqrt(2 / (1 - LEVEL**2))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def _wilson(sums: Floats) -> Interval:
    """Interval of a share, of [conversations, (events, chances)].

    Chances count as many as the clustering leaves of them: n·p(1-p) / variance, at most n, at least one a conversation.
    """
    events, chances = sums.sum(axis=0)
    if chances == 0:
        return NOTHING
    p = float(events / chances)
    clusters = int((sums[:, 1] > 0).sum())
    variance = float(np.sum((sums[:, 0] - p * sums[:, 1]) ** 2)) / chances**2 * clusters / max(clusters - 1, 1)
    effective = min(float(chances), max(float(clusters) if variance == 0 else p * (1 - p) / variance, 1.0))
    z = _t(clusters - 1)
    middle = (p + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * math.sqrt(p * (1 - p) / effective + z**2 / (4 * effective**2))
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), clusters)


def with_spread(interval: Interval, deviation: float, repeats: int) -> Interval:
    """The interval with an independent noise in its value, whose standard deviation was measured in `repeats` repetitions.

    The variances are added, and the quantile is that of the degrees of freedom that remain (Welch 1947, Satterthwaite 1946).
    """
    if interval.value is None or interval.low is None or interval.high is None or repeats < 2:
        return interval
    z, ends = _NORMAL.inv_cdf((1 + LEVEL) / 2), list[float]()
    for half in (interval.value - interval.low, interval.high - interval.value):
        total = (half / z) ** 2 + deviation**2
        freedom = total**2 * (repeats - 1) / deviation**4 if deviation else math.inf
        ends.append(max(half, math.sqrt(total) * (z if freedom > 1e4 else _t(int(freedom)))))
    return replace(interval, low=interval.value - ends[0], high=interval.value + ends[1])


def rows_needed(interval: Interval, limit: float, rows: int) -> int | None:
    """About how many rows would settle on which side of the limit the value is, four times out of five (80 % power), if the
    value is what it seems: a width shrinks with the root of their number.

    Null where the value is the limit.
    """
    if interval.value is None or interval.low is None or interval.high is None:
        return None
    width = interval.high - interval.value if interval.value < limit else interval.value - interval.low
    distance = abs(interval.value - limit)
    if distance <= 1e-12 * max(1.0, abs(limit)):
        return None
    return max(rows + 1, math.ceil(round(rows * (POWERED * width / distance) ** 2, 6)))


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Adjusted p-values (the family-wise error stays at the level); null stays null."""
    known = sorted(((p, name) for name, p in p_values.items() if p is not None))
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    most = 0.0
    for n, (p, name) in enumerate(known):
        most = max(most, min(1.0, p * (len(known) - n)))
        adjusted[name] = most
    return adjusted


def p_value(difference: Interval) -> float | None:
    """Two-sided, of "no difference", read back from the interval: the normal whose tail the interval ends at.

    1 where both candidates are equal row by row, null where there is no interval, or one of fewer than MIN_CONVERSATIONS.
    """
    if difference.value is None or difference.low is None or difference.high is None or not difference.enough:
        return None
    width = difference.value - difference.low if difference.value > 0 else difference.high - difference.value
    if difference.value == 0:
        return 1.0
    return 2 * (1 - _NORMAL.cdf(_NORMAL.inv_cdf((1 + LEVEL) / 2) * abs(difference.value) / width)) if width > 0 else 0.0


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def as_dicts(intervals: dict[str, Interval]) -> dict[str, dict[str, Any]]:
    """For report.json."""
    return {name: interval.as_dict() for name, interval in intervals.items()}
