"""The guards by simulation: false rollbacks of a healthy model, and requests until a bad one is back at zero.

    python benchmarks/run.py guards

Everything is looked at after every request or user. Errors: only an error can raise an alarm, and between two errors both
statistics fall evenly, so a run is a row of geometric gaps, and thousands of days go at once; a test holds this against
`guards.sprt` and `guards.cusum`. Each day is a step of its own, with half of the traffic the candidate's: the ratio test runs
once a day, which is its worst case. Where errors come before the good replies to what was asked with them, steps are simulated
request by request, with and without the wait for those. Feedback and latency: how often two equal arms are ever told apart, or a
percentile is missed, beside the interval for one look at the same level.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.special import betaln
from scipy.stats import beta

from benchmarks.measure import Row, cpu
from finetune_assets.assistants.settings.serving import RolloutSettings
from finetune_assets.serving import guards
from finetune_assets.serving.observed import WAIT, settled

DAYS = 20_000
RUNS = 20_000
SETTINGS = RolloutSettings()
Array = np.ndarray[Any, Any]


def alarms(rate: float, requests: int, runs: int, seed: int) -> Array:
    """Requests until the errors guard fails at a rate of errors, for each run; infinite where it does not within `requests`."""
    chance = np.random.default_rng(seed)
    up = guards.error_ratio(True, SETTINGS.usual_errors, SETTINGS.max_errors)
    down = -guards.error_ratio(False, SETTINGS.usual_errors, SETTINGS.max_errors)
    bad, good = math.log((1 - guards.BETA_ERRORS) / guards.ALPHA_ERRORS), math.log(guards.BETA_ERRORS / (1 - guards.ALPHA_ERRORS))
    late = math.log(guards.CUSUM_ODDS)
    at, ratio, chart = (np.zeros(runs) for _ in range(3))
    first, found = np.full(runs, math.inf), np.full(runs, math.inf)
    testing = np.ones(runs, dtype=bool)
    while (at < requests).any():
        gap = chance.geometric(rate, runs)  # requests up to and with the next error
        at += gap
        ratio -= (gap - 1) * down
        chart = np.maximum(0.0, chart - (gap - 1) * down) + up
        testing &= (ratio > good) & (at <= guards.FIRST)
        ratio += up
        first = np.where(testing & (ratio >= bad) & (at <= requests), np.minimum(first, at), first)
        testing &= ratio < bad
        found = np.where((chart >= late) & (at <= requests), np.minimum(found, at), found)
    return np.minimum(first, found)


def slow_replies(rate: float, per_second: int, seed: int, *, waits: bool = True) -> tuple[str, int, float]:
    """A step of two minutes, looked at every two seconds: what the ratio test says, after how many requests, and the seconds
    between the request that decided and the look. Errors come at once, good replies after 5 to 25 s; `waits`: see `settled`."""
    chance = np.random.default_rng(seed)
    came = np.sort(chance.uniform(0, 120, 120 * per_second))
    bad = chance.random(len(came)) < rate
    took = np.where(bad, 0.01, chance.uniform(5, 25, len(came)))
    start = datetime.datetime(2026, 11, 1)
    for at in range(2, 150, 2):
        known = came + took <= at
        if not known.any():
            continue
        longest = float(took[known & ~bad].max(initial=0)) or WAIT
        newest, now = (start + datetime.timedelta(seconds=float(one)) for one in (came[known].max(), at))
        until = (settled(newest, longest, now) - start).total_seconds() if waits else at
        seen = known & (came <= until)
        outcome, after = guards.sprt(bad[seen][: guards.FIRST].tolist(), SETTINGS.usual_errors, SETTINGS.max_errors)
        if outcome != "inconclusive":
            return outcome, after, at - float(came[seen][after - 1])
    return "inconclusive", 0, 0.0


def told_apart(users: int, runs: int, seed: int) -> tuple[float, float]:
    """Share of runs in which two equal arms ever differ in negative feedback: by the bets, and by a z-test of the same level.

    One user a look in the candidate's arm and three in the champion's; a user judges once to five times.
    """
    chance = np.random.default_rng(seed)

    def arm(count: int) -> Array:
        judged = chance.integers(1, 6, (runs, count))
        return chance.binomial(judged, chance.beta(0.4, 1.6, (runs, count))) / judged

    found = arm(users) - arm(3 * users).reshape(runs, users, 3).mean(2)
    n, looks = np.arange(1, users + 1), slice(guards.MIN_RATERS - 1, None)
    rich = math.log(2 / guards.ALPHA_FEEDBACK)
    got_rich = np.zeros(runs, dtype=bool)
    for sign in (1, -1):
        logs = np.stack([np.log1p(bet * sign * found).cumsum(1) for bet in guards.BETS])
        got_rich |= (np.logaddexp.reduce(logs) - math.log(len(guards.BETS)) >= rich)[:, looks].any(1)
    mean = found.cumsum(1) / n
    spread = np.maximum((found**2).cumsum(1) / n - mean**2, 1e-12) / n
    z = NormalDist().inv_cdf(1 - guards.ALPHA_FEEDBACK / 2) * np.sqrt(spread)
    return float(got_rich.mean()), float((np.abs(mean) > z)[:, looks].any(1).mean())


def raters(better: float, runs: int, seed: int, margin: float = 0.1) -> tuple[float, float]:
    """Users of each arm until a candidate whose negative feedback is lower by `better` is certainly within the margin: median
    and 95th percentile of the runs; the champion's is 20 %."""
    chance, users = np.random.default_rng(seed), 2000

    def arm(share: float) -> Array:
        judged = chance.integers(1, 6, (runs, users))
        return chance.binomial(judged, chance.beta(2 * share, 2 * (1 - share), (runs, users))) / judged

    found = arm(0.2) - arm(0.2 - better)  # turned around: the bet is that the candidate is below the margin
    logs = [np.log1p(min(bet, 0.99 / (1 - margin)) * (found + margin)).cumsum(1) for bet in guards.BETS]
    rich = np.logaddexp.reduce(np.stack(logs)) - math.log(len(guards.BETS)) >= math.log(2 / guards.ALPHA_FEEDBACK)
    first = np.where(rich.any(1), rich.argmax(1) + 1, np.inf)
    return float(np.median(first)), float(np.quantile(first, 0.95))


def percentile_missed(replies: int, runs: int, seed: int) -> tuple[float, float]:
    """Share of runs in which the interval of the 95th percentile ever misses it: the sequence's, and one for a single look."""
    share, alpha = 0.95, guards.ALPHA_LATENCY
    below = (np.random.default_rng(seed).random((runs, replies)) < share).cumsum(1)
    n = np.arange(1, replies + 1)
    a, b = guards.PRIOR_SHARE * share, guards.PRIOR_SHARE * (1 - share)
    odds = betaln(a + below, b + n - below) - betaln(a, b) - below * math.log(share) - (n - below) * math.log(1 - share)
    z = NormalDist().inv_cdf(1 - alpha / 2)
    once = np.abs(below - n * share) > z * np.sqrt(n * share * (1 - share)) + 1
    looks = slice(guards.MIN_LATENCIES - 1, None)
    return float((odds > -math.log(alpha))[:, looks].any(1).mean()), float(once[:, looks].any(1).mean())


def rows(rounds: int) -> list[Row]:
    """A healthy model at 2, 20 and 200 requests a minute; models with 5 % and 20 % errors; one that turns bad later."""
    del rounds
    made: list[Row] = []
    for what, ours, alpha in (
        ("equal arms told apart by feedback, 1,000 users looked at one by one", lambda: told_apart(1000, 2000, 1), 0.01),
        ("95th percentile missed, 10,000 replies looked at one by one", lambda: percentile_missed(10_000, 2000, 1), 0.001),
    ):
        missed = (float("nan"), float("nan"))

        def peek(ours: Callable[[], tuple[float, float]] = ours) -> None:
            nonlocal missed
            missed = ours()

        seconds = cpu(peek, 1)
        note = f"{missed[0]:.2%} of 2,000 runs; with an interval for one look {missed[1]:.1%}"
        made.append(Row(what, seconds, bar=f"at most {alpha:.1%}", met=missed[0] <= alpha, note=note))
    for better in (0.0, 0.05):
        needed = (float("nan"), float("nan"))

        def rate_all(better: float = better) -> None:
            nonlocal needed
            needed = raters(better, 1000, 1)

        seconds = cpu(rate_all, 1)
        what = f"raters in each arm until a margin of 10 points is certain, candidate {100 * better:g} points better"
        made.append(Row(what, seconds, note=f"median {needed[0]:.0f}, 95th percentile {needed[1]:.0f}, 1,000 runs"))
    for per_minute in (2, 20, 200):
        for rate in (0.005, 0.01):
            taken = float("nan")

            def healthy(rate: float = rate, per_minute: int = per_minute) -> None:
                nonlocal taken
                taken = float(np.isfinite(alarms(rate, per_minute * 720, DAYS, per_minute)).mean())

            seconds = cpu(healthy, 1)
            most = float(beta.ppf(0.95, taken * DAYS + 1, DAYS - taken * DAYS))  # Clopper & Pearson (1934), one-sided
            promised = {"bar": "< 1 % of days", "met": most < 0.01} if rate < SETTINGS.usual_errors else {}
            what = f"false rollbacks at {100 * rate:g} % errors, {per_minute} requests a minute"
            note = f"{taken * DAYS:.0f} of {DAYS:,} days: {taken:.3%} a day, at most {most:.3%} (95 %)"
            made.append(Row(what, seconds, note=note, **promised))
    fell: dict[bool, int] = {}

    def busy() -> None:
        for waits in (True, False):
            fell[waits] = sum(slow_replies(0.005, 100, seed, waits=waits)[0] == "failed" for seed in range(1000))

    seconds = cpu(busy, 1)
    note = f"{fell[True]} of 1,000 steps; judged as they end {fell[False]}"
    what = "false rollbacks at 0.5 % errors, 6,000 requests a minute, good replies 5 to 25 s"
    made.append(Row(what, seconds, bar="< 1 %", met=fell[True] < 10, note=note))
    for rate, bar in ((0.05, 150), (0.2, 25)):
        found = np.empty(0)

        def bad(rate: float = rate) -> None:
            nonlocal found
            found = alarms(rate, 50_000, RUNS, 1)

        seconds = cpu(bad, 1)
        median, high = np.quantile(found, [0.5, 0.95])
        note = f"median {median:.0f}, 95th percentile {high:.0f}, {np.isinf(found).mean():.2%} never, {RUNS:,} runs"
        what = f"requests until back at zero, {100 * rate:g} % errors"
        made.append(Row(what, seconds, bar=f"about {bar} (median)", met=bool(median <= 1.2 * bar), note=note))
    return made
