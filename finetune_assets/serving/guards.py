"""Statistics of a rollout step, all of them safe to look at after every request. Numbers in, a verdict with its interval out.

errors      Wald (1945), sequential probability ratio test of `usual` against `max_errors` at ALPHA_ERRORS.
            Restart rule: the test runs once, over a step's first FIRST requests. One that is started again as soon as it has
            found the model healthy misfires sooner or later. A model that goes bad later is found by a chart over the last
            FIRST requests: Page (1954), CUSUM, twice as slow, with a false alarm in years.
feedback    Waudby-Smith & Ramdas (2024), Estimating means of bounded random variables by betting: a confidence sequence of
            the difference of two means, exact for any distribution and any number of users. The unit is the user: several
            ratings of one person are one number, and one of the smaller arm meets as many of the other as the split plans.
assignment  Lindon & Malek (2022), Anytime-valid inference for multinomial count data: Bayes factor of the split of users.
latency     The same Bayes factor of the replies below the true 95th percentile, which are a fixed share of all, inverted: a
            confidence sequence of the percentile from order statistics, for any distribution. By Ville's inequality a sequence
            misses the truth at any look with at most its alpha; the ratio fails only where both arms' ends say so.
cost        Johari, Pekelis & Walsh (2022), Always valid inference: the mixture sequential ratio test of the difference of two
            means, inverted; in parts of the champion's cost. Its variances are estimated: for large samples.
            Latency and cost can change late, so a sequence begins every FIRST replies, and the one before the newest is looked
            at (`observed`): it holds FIRST to 2 FIRST of the newest replies. The k-th has 6/(pi k)² of alpha: alpha in all.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, variance
from typing import Any

import numpy as np

from finetune_assets.registry.rollouts import Outcome

ALPHA_ERRORS = 0.001
BETA_ERRORS = 0.05  # a model as bad as `max_errors` is taken for healthy at most this often, by the first test
CUSUM_ODDS = 1e6
FIRST = 5_000  # requests
ALPHA_FEEDBACK = 0.01
MIN_RATERS = 10  # users with feedback in the smaller arm, below which nothing is said
BETS = (0.15, 0.3, 0.6, 0.9)  # shares of the capital that are put on a difference; small ones see small differences
ALPHA_ASSIGNMENT = 0.001
PRIOR_SHARE = 100.0  # weight of the planned share before anything is seen, in users or replies
MIN_LATENCIES = 100
ALPHA_LATENCY = 0.001
ALPHA_COST = 0.001
MIXING = 0.1  # standard deviation of the differences that the cost's sequence is sharpest at


@dataclass(frozen=True)
class Guard:
    """What one guard says: its value with the interval, the limit, how much it has seen, and the sentence for a person."""

    name: str
    outcome: Outcome
    value: float | None
    low: float | None
    high: float | None
    limit: float | None
    seen: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For the ledger's events, rounded."""
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Timed:
    """Values of one arm, oldest first, of the sequence with this number; sequences begin every FIRST requests."""

    values: Sequence[float]
    sequence: int = 0


# errors


def error_ratio(bad: bool, usual: float, most: float) -> float:
    """What one request adds to the log likelihood ratio of `most` against `usual`."""
    return math.log(most / usual) if bad else math.log((1 - most) / (1 - usual))


def sprt(bad: Sequence[bool], usual: float, most: float) -> tuple[Outcome, int]:
    """Outcome of the ratio test over requests in their order, and after how many it was reached (else all of them)."""
    upper, lower = math.log((1 - BETA_ERRORS) / ALPHA_ERRORS), math.log(BETA_ERRORS / (1 - ALPHA_ERRORS))
    total = 0.0
    for n, one in enumerate(bad, start=1):
        total += error_ratio(one, usual, most)
        if total >= upper:
            return "failed", n
        if total <= lower:
            return "passed", n
    return "inconclusive", len(bad)


def cusum(bad: Sequence[bool], usual: float, most: float) -> int | None:
    """After how many requests the chart of a late change alarms; null if it does not."""
    total, limit = 0.0, math.log(CUSUM_ODDS)
    for n, one in enumerate(bad, start=1):
        total = max(0.0, total + error_ratio(one, usual, most))
        if total >= limit:
            return n
    return None


def errors(first: Sequence[bool], last: Sequence[bool], usual: float, most: float) -> Guard:
    """Errors, timeouts and policy violations of the candidate. `first`, `last`: the first and last FIRST of a step."""
    outcome, after = sprt(first, usual, most)
    seen = last if len(last) >= len(first) else first
    share = sum(seen) / len(seen) if seen else None
    text = {
        "failed": f"too many errors after {after} requests",
        "passed": f"healthy after {after} requests",
        "inconclusive": f"not settled after {after} requests",
    }[outcome]
    late = cusum(last, usual, most) if outcome != "failed" else None
    if late is not None:
        outcome, text = "failed", "errors have become too many"
    if not seen:
        outcome, text = "gathering", "none to judge yet"
    shown = f"{sum(seen)} of {len(seen)} requests failed: {text}"
    return Guard("errors", outcome, share, None, None, most, len(seen), shown)


def worse(candidate: Sequence[bool], champion: Sequence[bool], share: float) -> bool:
    """Whether the candidate certainly fails more often than the champion, by the last FIRST requests of each.

    A request of the smaller arm meets those of the other that came at its time: where both arms are whole, as many as there are
    of each; else as many as `share` plans (in shadow, 0, each request is one of both). So an outage of both is no difference.
    False alarms are as rare as the chart's of a late change.
    """
    if max(len(candidate), len(champion)) >= FIRST:
        mine, theirs = meeting(share or 0.5)
        count = max(1, min(len(candidate) // mine, len(champion) // theirs))
        candidate, champion = candidate[-count * mine :], champion[-count * theirs :]
    count = min(len(candidate), len(champion))
    if count == 0:
        return False
    ours, others = ([float(part.mean()) for part in np.array_split(np.asarray(arm), count)] for arm in (candidate, champion))
    return interval([a - b for a, b in zip(ours, others, strict=True)], 1 / CUSUM_ODDS)[1] > 0


# feedback


def meeting(share: float) -> tuple[int, int]:
    """How many users of the candidate meet how many of the champion, where `share` of all users have the candidate."""
    return (1, max(1, round((1 - share) / share))) if share <= 0.5 else (max(1, round(share / (1 - share))), 1)


def differences(candidate: Sequence[float], champion: Sequence[float], share: float) -> list[float]:
    """Users of both arms in their order, met as the split plans it (1 of the candidate and 9 of the champion at 10 %): the
    candidate's mean minus the champion's of each meeting, -1..1."""
    mine, theirs = meeting(share)
    count = min(len(candidate) // mine, len(champion) // theirs)
    return [fmean(candidate[n * mine : (n + 1) * mine]) - fmean(champion[n * theirs : (n + 1) * theirs]) for n in range(count)]


def interval(values: Sequence[float], alpha: float = ALPHA_FEEDBACK) -> tuple[float, float, float]:
    """Mean of independent values in -1..1, and its always-valid interval: the means against which no bettor has got rich.

    Betting at fair odds that the mean is above m, nobody's capital ever reaches 2 / alpha with more than half of alpha's chance
    if it is m; the capital falls with m, so the ends are found by bisection.
    """
    found = np.asarray(values, dtype=float)
    rich = math.log(2 / alpha)

    def end(sign: int) -> float:
        """The lowest mean that bets on a higher one leave possible; for the highest, everything is turned around."""
        low, high = -1.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if capital(sign * found, middle) >= rich else (low, middle)
        return sign * low

    return float(found.mean()), end(1), end(-1)


def capital(values: np.ndarray[Any, Any], mean: float) -> float:
    """Log of what one unit has become that was bet on values (along the last axis) above `mean`, evenly over BETS."""
    most = 0.99 / (1 + mean) if mean > -1 else math.inf
    logs = [np.log1p(min(bet, most) * (values - mean)).sum() for bet in BETS]
    return float(np.logaddexp.reduce(logs)) - math.log(len(BETS))


def radius(spread: float, alpha: float, mixing: float = MIXING) -> float:
    """Half the width of the confidence sequence of a difference with the (estimated) variance `spread`."""
    prior = mixing**2
    return math.sqrt(2 * spread * (spread + prior) / prior * (math.log(1 / alpha) + 0.5 * math.log((spread + prior) / spread)))


def non_inferior(name: str, arms: tuple[Sequence[float], Sequence[float]], share: float, margin: float, what: str) -> Guard:
    """Whether the candidate's mean (less is better) is at most `margin` above the champion's. `arms`: candidate's and champion's
    users, oldest first, 0..1; `share`: the candidate's.

    Failed where it is certainly above it, and not certainly within the margin.
    """
    candidate, champion = arms
    seen = len(candidate) + len(champion)
    if not candidate and not champion:
        return Guard(name, "not_measurable", None, None, None, margin, 0, f"{what}: no user has said anything yet")
    met, sides = differences(candidate, champion, share), meeting(share)
    if len(met) < MIN_RATERS:
        needed = f"{MIN_RATERS * sides[0]} and {MIN_RATERS * sides[1]} needed"
        text = f"{what}: {len(candidate)} users of the candidate, {len(champion)} of the champion; {needed}"
        return Guard(name, "inconclusive", None, None, None, margin, seen, text)
    value, low, high = interval(met)
    outcome: Outcome = "passed" if high < margin else "failed" if low > 0 else "inconclusive"
    text = f"{what}: {value:+.3f} [{low:+.3f}, {high:+.3f}], limit {margin:+.3f}, {len(candidate)} and {len(champion)} users"
    return Guard(name, outcome, value, low, high, margin, seen, text)


# the split of users


def assignment(candidate: int, champion: int, share: float) -> Guard:
    """Whether users were split as planned; if not, nothing that compares the arms is worth anything."""
    total = candidate + champion
    text = f"{candidate} of {total} users have the candidate, planned are {share:.0%}"
    if share in (0.0, 1.0) or total == 0:
        return Guard("assignment", "passed", None, None, None, share, total, text)
    off = _log_odds(candidate, total, share) > math.log(1 / ALPHA_ASSIGNMENT)
    if off:
        text += ": the split is not the planned one, which makes the comparison void"
    return Guard("assignment", "not_measurable" if off else "passed", candidate / total, None, None, share, total, text)


def _log_odds(hits: int, total: int, share: float) -> float:
    """Log Bayes factor of "the share is another one" (Beta, around it) against `share`: a martingale while `share` is true."""
    a, b = PRIOR_SHARE * share, PRIOR_SHARE * (1 - share)
    seen = _log_beta(a + hits, b + total - hits) - _log_beta(a, b)
    return seen - hits * math.log(share) - (total - hits) * math.log(1 - share)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


# latency and cost


def spent(alpha: float, sequence: int) -> float:
    """What the sequence with this number, from 0, has of `alpha`; all of them together have all of it."""
    return alpha * 6 / (math.pi * (sequence + 1)) ** 2


def latency(candidate: Timed, champion: Timed, ratio: float) -> Guard:
    """95th percentiles of the seconds of a reply: the candidate's against `ratio` times the champion's."""
    seen = len(candidate.values) + len(champion.values)
    if min(len(candidate.values), len(champion.values)) < MIN_LATENCIES:
        text = f"{len(candidate.values)} and {len(champion.values)} replies, {MIN_LATENCIES} of each are needed"
        return Guard("latency", "inconclusive", None, None, None, ratio, seen, text)
    mine, theirs = (percentile(arm.values, alpha=spent(ALPHA_LATENCY, arm.sequence)) for arm in (candidate, champion))
    value, low, high = mine[0] / theirs[0], mine[1] / theirs[2], mine[2] / theirs[1]
    outcome: Outcome = "failed" if low > ratio else "passed" if value <= ratio else "inconclusive"
    text = f"95 % of replies within {mine[0]:.3f} s, the champion's within {theirs[0]:.3f} s: {value:.2f} times, limit {ratio:g}"
    return Guard("latency", outcome, value, low, high if math.isfinite(high) else None, ratio, seen, text)


def percentile(values: Sequence[float], share: float = 0.95, alpha: float = ALPHA_LATENCY) -> tuple[float, float, float]:
    """A percentile and its always-valid interval; infinite where there is too little for an upper end (about 250 values)."""
    ordered = sorted(max(value, 1e-6) for value in values)
    count, most = len(ordered), math.log(1 / alpha)
    middle = math.ceil(count * share)

    def possible(below: int) -> bool:
        return _log_odds(below, count, share) <= most

    # Counts that can be are neighbours: the first and the last of them by bisection.
    first = bisect.bisect_left(range(middle), True, key=possible)
    last = middle + bisect.bisect_left(range(middle, count + 1), True, key=lambda below: not possible(below)) - 1
    return ordered[middle - 1], ordered[first - 1] if first else 0.0, ordered[last] if last < count else math.inf


def cost(candidate: Timed, champion: Timed, ratio: float) -> Guard | None:
    """Mean cost of a request against `ratio` times the champion's; null where no cost is known."""
    mine, theirs = candidate.values, champion.values
    if not mine or not theirs or fmean(theirs) <= 0:
        return None
    seen, usual = len(mine) + len(theirs), fmean(theirs)
    value = fmean(mine) / usual
    if min(len(mine), len(theirs)) < MIN_LATENCIES:
        return Guard("cost", "inconclusive", value, None, None, ratio, seen, f"{len(mine)} and {len(theirs)} requests")
    spread = (variance(mine) / len(mine) + ratio**2 * variance(theirs) / len(theirs)) / usual**2
    alpha = spent(spent(ALPHA_COST, candidate.sequence), champion.sequence)
    half = radius(spread, alpha) if spread > 0 else 0.0
    low, high = value - half, value + half
    outcome: Outcome = "failed" if low > ratio else "passed" if value <= ratio else "inconclusive"
    text = f"a request costs {value:.2f} times the champion's, limit {ratio:g}"
    return Guard("cost", outcome, value, low, high, ratio, seen, text)


def together(guards: Sequence[Guard]) -> Outcome:
    """The worst of all: failed before not measurable before inconclusive before passed."""
    outcomes = {guard.outcome for guard in guards}
    for outcome in ("failed", "not_measurable", "inconclusive", "gathering"):
        if outcome in outcomes:
            return outcome
    return "passed"
