"""The statistics by simulation: what they promise, at little and at much traffic, looked at after every request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import guards as simulated
from finetune_assets.serving import guards
from finetune_assets.serving.guards import Timed

USUAL, MOST = 0.01, 0.05


def first_alarm(bad: np.ndarray) -> float:
    """Requests until the errors guard fails, when it is asked after each of them; infinite if it never does."""
    outcome, after = guards.sprt(bad[: guards.FIRST].tolist(), USUAL, MOST)
    late = guards.cusum(bad.tolist(), USUAL, MOST)
    return min(after if outcome == "failed" else np.inf, late if late is not None else np.inf)


def test_thousands_of_days_at_once_are_simulated_as_request_by_request() -> None:
    """The benchmark's vectorised alarms have the distribution of the guard's own, at a rate where half of the runs alarm."""
    chance = np.random.default_rng(8)
    one_by_one = np.array([first_alarm(chance.random(400) < 0.035) for _ in range(1500)])
    at_once = simulated.alarms(0.035, 400, 30_000, 8)
    for most in (50, 100, 200, 400):
        share, expected = (one_by_one <= most).mean(), (at_once <= most).mean()
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 1500)


@pytest.mark.parametrize("per_minute", [2, 20, 200])
def test_a_healthy_model_is_not_taken_back(per_minute: int) -> None:
    """Days at 0.5 % errors, the candidate with half of the traffic: fewer than 1 % of them alarm."""
    alarms = np.isfinite(simulated.alarms(0.005, per_minute * 720, 5000, per_minute)).sum()
    assert alarms <= 5  # ten times fewer than allowed


@pytest.mark.parametrize(("rate", "median", "ninety_fifth"), [(0.05, 160, 450), (0.2, 27, 60)])
def test_a_bad_model_is_found(rate: float, median: float, ninety_fifth: float) -> None:
    taken = simulated.alarms(rate, 20_000, 4000, 1)
    assert np.median(taken) <= median
    assert np.quantile(taken, 0.95) <= ninety_fifth


def test_a_model_that_goes_bad_late_is_found_too() -> None:
    chance = np.random.default_rng(2)
    for rate, most in ((0.05, 700), (0.2, 100)):
        runs = [np.concatenate([chance.random(3000) < 0.005, chance.random(2000) < rate]) for _ in range(40)]
        assert np.quantile([first_alarm(run) - 3000 for run in runs], 0.95) <= most


def test_errors_that_come_before_the_good_replies_take_no_healthy_model_back() -> None:
    """0.5 % errors at 6,000 requests a minute, where hundreds are under way: four steps in ten would fall, and none does."""
    runs = range(200)
    hasty = sum(simulated.slow_replies(0.005, 100, seed, waits=False)[0] == "failed" for seed in runs)
    patient = sum(simulated.slow_replies(0.005, 100, seed)[0] == "failed" for seed in runs)
    assert hasty > 60
    assert patient == 0


@pytest.mark.parametrize(("rate", "median"), [(0.05, 160), (0.2, 27)])
def test_a_bad_model_whose_good_replies_are_slow_is_found_as_soon(rate: float, median: float) -> None:
    """After as many requests as where all take the same time. The look comes when what was asked with the last of them has ended
    and something after it too: half a minute later where replies take 25 s."""
    found = [simulated.slow_replies(rate, 10, seed) for seed in range(100)]
    taken = [(after, late) for outcome, after, late in found if outcome == "failed"]
    assert len(taken) > 90
    assert np.median([after for after, _ in taken]) <= median
    assert np.quantile([late for _, late in taken], 0.95) <= 35


def test_a_test_that_is_started_again_at_once_misfires() -> None:
    """The reason for the restart rule: a model with 1 % errors, which is fine, is taken back again and again."""
    chance = np.random.default_rng(3)
    bad = (chance.random(400_000) < 0.01).tolist()
    at, alarms = 0, 0
    while at < len(bad):
        outcome, after = guards.sprt(bad[at : at + guards.FIRST], USUAL, MOST)
        alarms += outcome == "failed"
        at += after
    assert alarms >= 1
    once, _ = guards.sprt(bad[: guards.FIRST], USUAL, MOST)
    assert once == "passed"


def users(chance: np.random.Generator, count: int, share: float) -> list[float]:
    """Share of negative feedback of each user: some are never content, and one user may judge often."""
    content = chance.beta(share * 2, (1 - share) * 2, count)
    judged = chance.integers(1, 6, count)
    return (chance.binomial(judged, content) / judged).tolist()


def test_looking_all_the_time_tells_no_lies() -> None:
    """Equal arms are told apart in at most 1 % of the runs, a percentile is missed in 0.1 %; one-look intervals do worse."""
    sequence, once = simulated.told_apart(400, 1500, 4)
    assert sequence <= 0.01
    assert once > 0.05
    sequence, once = simulated.percentile_missed(3000, 2000, 4)
    assert sequence <= 0.003
    assert once > 0.005


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 10_000))
def test_a_percentile_lies_in_its_interval(count: int, seed: int) -> None:
    """The ends are where the Bayes factor says so, found by trying every count."""
    values = np.random.default_rng(seed).exponential(1.0, count + 1).tolist()
    value, low, high = guards.percentile(values)
    ordered, n = sorted(values), len(values)
    possible = [below for below in range(n + 1) if guards._log_odds(below, n, 0.95) <= np.log(1 / guards.ALPHA_LATENCY)]
    assert low == (ordered[possible[0] - 1] if possible[0] else 0.0)
    assert high == (ordered[possible[-1]] if possible[-1] < n else np.inf)
    assert low <= value <= high


def test_all_sequences_together_spend_alpha() -> None:
    assert sum(guards.spent(0.01, n) for n in range(200_000)) == pytest.approx(0.01, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(-0.99, 0.99))
def test_a_mean_is_left_out_where_a_bettor_got_rich_against_it(values: list[float], mean: float) -> None:
    value, low, high = guards.interval(values)
    assert low - 1e-6 <= value <= high + 1e-6
    rich = np.log(2 / guards.ALPHA_FEEDBACK)
    found = np.array(values)
    if abs(mean - low) > 1e-6:
        assert (mean < low) == (guards.capital(found, mean) >= rich)
    if abs(mean - high) > 1e-6:
        assert (mean > high) == (guards.capital(-found, -mean) >= rich)


def test_a_bet_is_fair_at_the_true_mean() -> None:
    """What makes the sequence valid: one unit stays one unit on average, whatever the distribution."""
    for values, shares in (([-0.2, 0.8], [0.8, 0.2]), ([-1.0, 0.0, 1.0], [0.1, 0.6, 0.3]), ([-0.05, 1.0], [0.99, 0.01])):
        mean = float(np.dot(values, shares))
        one = sum(share * np.exp(guards.capital(np.array([value]), mean)) for value, share in zip(values, shares, strict=True))
        assert one == pytest.approx(1.0)


def test_users_meet_as_the_split_plans() -> None:
    assert [guards.meeting(share) for share in (0.1, 0.25, 0.5, 0.9)] == [(1, 9), (1, 3), (1, 1), (9, 1)]
    assert guards.differences([1.0, 0.0], [0.0] * 9 + [1.0] * 9 + [0.5], 0.1) == [1.0, -1.0]


def test_feedback_passes_fails_or_asks() -> None:
    chance = np.random.default_rng(5)
    ask = lambda mine, theirs: guards.non_inferior(  # noqa: E731
        "negative_feedback", (mine, theirs), len(mine) / max(1, len(mine) + len(theirs)), 0.1, "negative"
    )
    assert ask(users(chance, 400, 0.15), users(chance, 2000, 0.2)).outcome == "passed"
    assert ask(users(chance, 300, 0.6), users(chance, 2000, 0.2)).outcome == "failed"
    assert ask(users(chance, 30, 0.2), users(chance, 200, 0.2)).outcome == "inconclusive"
    assert ask([0.0] * 5, [0.0] * 90).outcome == "inconclusive"
    assert ask([], []).outcome == "not_measurable"
    assert ask([0.0] * 12, [0.0] * 12).outcome == "inconclusive"  # no event yet is no proof


def test_a_split_that_is_not_the_planned_one_is_void() -> None:
    assert guards.assignment(100, 900, 0.1).outcome == "passed"
    assert guards.assignment(3, 27, 0.1).outcome == "passed"
    assert guards.assignment(180, 820, 0.1).outcome == "not_measurable"
    chance = np.random.default_rng(6)
    void = 0
    for _ in range(100):
        mine = (chance.random(3000) < 0.1).cumsum()
        void += any(guards.assignment(int(mine[n]), n + 1 - int(mine[n]), 0.1).outcome != "passed" for n in range(50, 3000, 50))
    assert void <= 1


def test_latency_and_cost() -> None:
    chance = np.random.default_rng(7)
    fast, slow = (Timed(chance.exponential(mean, 1000).tolist()) for mean in (0.2, 0.8))
    assert guards.latency(fast, fast, 2).outcome == "passed"
    assert guards.latency(slow, fast, 2).outcome == "failed"
    assert guards.latency(Timed(fast.values[:20]), slow, 2).outcome == "inconclusive"
    assert guards.latency(Timed(slow.values[:150]), Timed(fast.values[:150]), 2).outcome == "inconclusive"
    assert guards.cost(Timed([]), Timed([]), 1.5) is None
    dear, cheap = guards.cost(slow, fast, 1.5), guards.cost(fast, fast, 1.5)
    assert (dear and dear.outcome, cheap and cheap.outcome) == ("failed", "passed")


def test_the_worst_counts() -> None:
    def together(*outcomes: str) -> str:
        return guards.together([guards.Guard(o, o, None, None, None, None, 0, "") for o in outcomes])  # type: ignore[arg-type]

    assert together("passed", "inconclusive", "failed", "not_measurable") == "failed"
    assert together("passed", "inconclusive", "not_measurable") == "not_measurable"
    assert together("passed", "inconclusive") == "inconclusive"
    assert together("passed") == "passed"


@pytest.mark.parametrize("ratio", [1, 6, 9, 14])
def test_an_outage_of_both_arms_is_no_difference(ratio: int) -> None:
    """Whatever the true split is, and at whatever moment it is looked at; a candidate that also fails by itself is found."""
    for bad in (5, 20, 60):
        candidate = [False] * 280 + [True] * bad
        champion = [False] * (280 * ratio) + [True] * (bad * ratio)
        assert not guards.worse(candidate, champion, 0.1)
    assert guards.worse([True, True, False] * 40, ([True] + [False] * 15) * (8 * ratio), 0.1)
    long = [False] * 20_000 + [True] * 900
    assert not guards.worse((long[::9])[-guards.FIRST :], long[-guards.FIRST :], 0.1)
