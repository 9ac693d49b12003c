"""Intervals: known answers, and simulation of what 95 % means."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import sacrebleu

from finetune_assets.assistants.settings.evaluation import Gates
from finetune_assets.evaluation import gates, text_scores
from finetune_assets.evaluation.report import settled
from finetune_assets.evaluation.statistics import (
    Bootstrap,
    Estimate,
    Interval,
    _t,
    _tango,
    holm,
    mean,
    p_value,
    ratio,
    rows_needed,
    share,
    with_spread,
)
from finetune_assets.evaluation.texts import Texts


def clusters(count: int, size: int = 2) -> list[str]:
    return [f"c{n // size}" for n in range(count)]


def test_identical_candidates_differ_by_exactly_nothing():
    values = list(np.random.default_rng(0).normal(size=40))
    found = Bootstrap(clusters(40)).difference(mean(values), mean(values))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_missing_values_are_left_out_and_none_at_all_gives_nothing():
    bootstrap = Bootstrap(clusters(6))
    assert bootstrap.interval(mean([1.0, None, 1.0, None, 4.0, None])).value == pytest.approx(2.0)
    assert bootstrap.interval(mean([None] * 6)) == Interval(None, None, None)
    assert bootstrap.interval(share([None] * 6)).value is None
    assert bootstrap.median([None] * 6).value is None


def test_ratio_is_that_of_the_sums_not_the_mean_of_the_ratios():
    columns = np.array([[1.0, 1.0], [90.0, 10.0]])
    assert Bootstrap(["a", "b"]).interval(Estimate(columns, ratio)).value == pytest.approx(91 / 11)


def test_coverage_of_a_skewed_ratio_in_clusters():
    """Nats over bytes, log-normal, rows of a conversation alike: 93 to 97 of 100 intervals hold the truth (0.5)."""
    generator = np.random.default_rng(7)
    held = 0
    trials = 600
    for _ in range(trials):
        size = generator.integers(20, 80, size=120).astype(float)
        own = np.repeat(generator.lognormal(-0.08, 0.4, size=60), 2)
        nats = size * 0.5 * own * generator.lognormal(-0.02, 0.2, size=120)
        found = Bootstrap(clusters(120), resamples=1000).interval(Estimate(np.stack([nats, size], axis=1), ratio))
        held += found.low <= 0.5 <= found.high
    assert 0.93 <= held / trials <= 0.97


def differences(trials: int, conversations: int, gap: float, seed: int) -> list[Interval]:
    """Differences of two candidates, the first better by `gap`; conversations alike, a noise of their own."""
    generator = np.random.default_rng(seed)
    made: list[Interval] = []
    for _ in range(trials):
        common = np.repeat(generator.normal(size=conversations), 2)
        first, second = (list(common + generator.normal(size=2 * conversations)) for _ in range(2))
        moved = [value + gap for value in first]
        made.append(Bootstrap(clusters(2 * conversations), resamples=500).difference(mean(moved), mean(second)))
    return made


def test_coverage_of_paired_differences():
    held = sum(found.low <= 0.2 <= found.high for found in differences(600, 60, 0.2, 5))
    assert 0.93 <= held / 600 <= 0.97


def test_a_model_beside_itself_is_seldom_promoted():
    """A/A through the gates: superior by chance in less than 5 % of the trials (2.5 % is what the interval promises)."""
    promoted = wrong = 0
    for found in differences(500, 60, 0.0, 6):
        evidence = gates.Evidence({}, {"similarity": found}, 1.0, 120, 60, 0, 0, versus_champion={"similarity": found})
        only = {
            name: None
            for name in Gates.model_fields
            if name not in ("above_similarity_floor", "canaries", "champion_margin", "base_margin", "keeps_details")
        }
        settings = Gates(**{**only, "above_similarity_floor": False, "canaries": False, "better_than_base": "similarity"})
        promoted += gates.verdict(gates.decide(settings, evidence, Texts("en"))) == "serve"
        margin = settings.model_copy(
            update={"better_than_base": None, "not_worse_than_champion": "similarity", "champion_margin": 0}
        )
        wrong += gates.verdict(gates.decide(margin, evidence, Texts("en"))) == "serve"
    assert promoted / 500 < 0.05
    assert wrong / 500 < 0.05


def shares(
    first: float, second: float, conversations: int, size: int = 1, together: bool = False, seed: int = 3
) -> Iterator[Interval]:
    """500 differences of two shares: half of the conversations answer as one. `together`: a row that is hard for one candidate is
    hard for the other."""
    generator = np.random.default_rng(seed)
    bootstrap = Bootstrap(clusters(conversations * size, size), resamples=1)
    for _ in range(500):
        luck = generator.random((2, conversations, size))
        alike = generator.random((2, conversations)) < 0.5
        luck[alike] = luck[alike][:, :1]
        mine, other = luck[0].ravel(), luck[0 if together else 1].ravel()
        yield bootstrap.difference(share(list(mine < first)), share(list(other < second)))


@pytest.mark.parametrize(
    ("first", "second", "conversations", "size", "together"),
    [
        (0.95, 1.0, 20, 1, False),  # rows that all agree, at the margin: 36 % passed by their bootstrap
        (0.95, 1.0, 40, 1, False),
        (0.98, 1.0, 60, 1, False),
        (0.98, 1.0, 200, 1, False),
        (0.90, 0.95, 60, 2, False),
        (0.60, 0.80, 60, 2, False),
        (0.85, 0.90, 100, 2, True),
        (0.50, 0.55, 100, 2, True),
    ],
)
def test_shares_that_differ_by_the_margin_seldom_pass(first: float, second: float, conversations: int, size: int, together: bool):
    """Nominal is 2.5 %; the interval holds the truth in at least 93 of 100."""
    found = list(shares(first, second, conversations, size, together))
    assert sum(one.low > first - second for one in found) / 500 <= 0.045
    assert sum(one.low <= first - second <= one.high for one in found) / 500 >= 0.93


def test_shares_of_equal_candidates_are_seldom_called_better():
    for of, conversations in ((0.9, 60), (0.5, 30), (0.99, 200), (0.8, 12), (0.6, 6)):
        found = list(shares(of, of, conversations, 2))
        assert sum(one.low > 0 for one in found) / 500 < 0.05
        assert sum(one.high < 0 for one in found) / 500 < 0.05


def test_a_large_test_set_settles_a_share():
    """Power is not given away: of 90 % with a margin of 5 points, on 1,000 conversations."""
    assert sum(one.low > -0.05 for one in shares(0.88, 0.90, 1000, seed=5)) / 500 > 0.5
    assert sum(one.low > -0.05 for one in shares(0.90, 0.90, 1000, seed=5)) / 500 > 0.9


def test_the_interval_of_paired_shares():
    """14 of 50 pairs differ, 12 one way: where the score statistic is 1.96, its likelihood maximised by search; and 20 pairs that
    agree, where the ends are z² / (n + z²)."""
    assert _tango(0.2, 14 / 50, 50, 1.959964) == pytest.approx((0.0611, 0.3447), abs=1e-4)
    assert _tango(0.0, 0.0, 20, 1.959964) == pytest.approx((-0.1611, 0.1611), abs=1e-4)


def test_rows_that_all_agree_are_not_known_to_be_equal():
    every, none = share([True] * 40), share([False] * 40)
    for first, second, value in ((every, every, 0), (every, none, 1), (none, every, -1)):
        found = Bootstrap(clusters(40)).difference(first, second)
        assert found.value == value
        assert found.high - found.low > 0.15
        assert found.conversations == 20


def test_a_model_worse_by_the_margin_seldom_passes_as_not_worse():
    passed = sum(found.low > -0.3 for found in differences(400, 60, -0.3, 8))
    assert passed / 400 < 0.05


@pytest.mark.parametrize(("conversations", "effect"), [(30, 0.25), (60, 0.15), (24, 0.5)])
def test_power_is_as_predicted(conversations: int, effect: float):
    """From an interval that cannot tell: with the rows that it asks for, about four of five tests tell."""
    seen = [found for found in differences(60, conversations, effect, 9) if found.value > effect / 2.5]
    needed = np.median([rows_needed(found, 0.0, 2 * conversations) or 0 for found in seen])
    gap = np.median([found.value for found in seen])
    told = [found.low > 0 for found in differences(300, round(needed / 2), float(gap), 10)]
    assert 0.7 < np.mean(told) < 0.9


def test_noise_of_retraining_is_part_of_a_widened_interval():
    """Coverage of the recipe's difference, whose version is one draw: spread measured in three trainings."""
    generator = np.random.default_rng(11)
    held = plain = 0
    trials = 4_000
    for _ in range(trials):
        versions = 0.2 + generator.normal(0, 0.05, size=3)
        value = float(versions[0] + generator.normal(0, 0.05))  # the sampling of test rows is common to all trainings
        found = Interval(value, value - 1.96 * 0.05, value + 1.96 * 0.05)
        wide = with_spread(found, float(np.std(versions, ddof=1)), 3)
        held += wide.low <= 0.2 <= wide.high
        plain += found.low <= 0.2 <= found.high
    assert plain / trials < 0.87
    assert 0.93 <= held / trials <= 0.97


def test_without_noise_nothing_is_widened():
    found = Interval(0.2, 0.1, 0.4)
    assert with_spread(found, 0.0, 3) == found
    assert with_spread(found, 0.5, 1) == found
    wide = with_spread(found, 0.1, 2)
    assert wide.value == 0.2
    assert wide.low < found.low < found.high < wide.high
    assert with_spread(Interval(None, None, None), 0.1, 3).value is None


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042)])
def test_quantiles_of_students_t(freedom: int, expected: float):
    assert _t(freedom) == pytest.approx(expected, rel=0.003)


def test_holm_by_hand():
    """The example of Holm (1979) as commonly given: 0.01, 0.04, 0.03, 0.005 -> 0.03, 0.06, 0.06, 0.02."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": None})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02, "e": None})


def test_p_values_read_the_interval():
    assert p_value(Interval(1.96, 0.0, 3.92)) == pytest.approx(0.05, abs=1e-3)
    assert p_value(Interval(-3.0, -4.0, -2.0)) < 0.001
    assert p_value(Interval(0.0, 0.0, 0.0)) == 1
    assert p_value(Interval(None, None, None)) is None


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_few_conversations_that_all_agree_prove_nothing(count: int):
    """Also when they are a part of many, as those of one intent are."""
    won = [1.0 if n < count else None for n in range(60)]
    lost = [0.0 if n < count else None for n in range(60)]
    found = Bootstrap(clusters(60, 1)).difference(share(won), share(lost))
    assert (found.value, found.conversations) == (1.0, count)
    assert found.low < 0.6
    bare = Bootstrap(clusters(60, 1)).difference(mean(won), mean(lost))
    assert (bare.value, bare.low, bare.high, bare.conversations) == (1.0, None, None, count)
    assert p_value(found) is None
    assert settled("accuracy", {**found.as_dict(), "p": holm({"i": p_value(found)})["i"]}) == "open"


def test_few_conversations_with_spread_have_an_interval_and_no_p():
    values = [0.8 + n / 60 if n < 12 else None for n in range(60)]
    found = Bootstrap(clusters(60, 1)).difference(mean(values), mean([0.0 if v else None for v in values]))
    assert 0 < found.low < found.value < found.high
    assert p_value(found) is None
    assert settled("accuracy", {**found.as_dict(), "p": None}) == "open"
    all_won = Bootstrap(clusters(60, 1)).difference(share([True] * 60), share([False] * 60))
    assert p_value(all_won) == 0
    assert settled("accuracy", {**all_won.as_dict(), "p": 0.0}) == "better"


def test_coverage_of_a_rare_share_that_a_bootstrap_would_miss():
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        events = generator.random(200) < 0.02
        found = Bootstrap(clusters(200, 1), resamples=2).interval(share(list(events)))
        held += found.low <= 0.02 <= found.high
    assert held / 300 >= 0.92


def test_no_event_still_has_an_upper_bound():
    found = Bootstrap(clusters(100, 1)).interval(share([False] * 100))
    assert (found.value, found.low) == (0.0, 0.0)
    assert 0.02 < found.high < 0.05


def test_rows_of_one_conversation_do_not_count_as_independent():
    values = list(np.random.default_rng(4).normal(size=40))
    fivefold = [value for value in values for _ in range(5)]
    alone = Bootstrap(clusters(40, 1)).interval(mean(values))
    together = Bootstrap(clusters(200, 5)).interval(mean(fivefold))
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_rows_needed_grow_with_the_square():
    assert rows_needed(Interval(0.75, 0.65, 0.85), 0.80, 100) == 818
    assert rows_needed(Interval(0.80, 0.70, 0.90), 0.80, 100) is None
    assert rows_needed(Interval(None, None, None), 0.80, 100) is None


def pairs() -> tuple[list[str], list[str]]:
    replies = ["Con gusto, anoto la cita del lunes a las 10.", "", "mañana mañana mañana", "hola", "x" * 10_000, "Claro que sí."]
    references = ["Con gusto, le anoto una cita el lunes a las 11.", "Perfecto.", "Mañana a las 9.", "", "Buenos días", "Claro."]
    return replies, references


def test_scores_of_sums_are_sacrebleus():
    from finetune_assets.worker.scores import texts

    replies, references = pairs()
    made = texts(replies, references)
    bleu = float(text_scores.bleu(np.array(made["bleu"], float).sum(axis=0)))
    chrf = float(text_scores.chrf(np.array(made["chrf"], float).sum(axis=0)))
    known = [
        [text for n, text in enumerate(texts) if references[n]] for texts in (replies, references)
    ]  # the others are left out
    assert bleu == pytest.approx(sacrebleu.corpus_bleu(known[0], [known[1]]).score)
    assert chrf == pytest.approx(sacrebleu.corpus_chrf(known[0], [known[1]]).score)
    for n, (reply, reference) in enumerate(zip(replies, references, strict=True)):
        expected = sacrebleu.corpus_bleu([reply], [[reference]]).score if reference else math.nan  # nothing to compare with
        assert float(text_scores.bleu(np.array(made["bleu"][n], float))) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert made["rouge_l"][1] == 0
    assert made["rouge_l"][references.index("")] is None
    assert all(math.isfinite(value) for value in made["rouge_l"] if value is not None)
    assert texts(["hola"], [" "]) == {"bleu": [[0] * 10], "chrf": [[0] * 18], "rouge_l": [None]}
