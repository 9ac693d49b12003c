"""Intervals: known answers, and simulation of what 95 % means."""

import math

import numpy as np
import pytest
import sacrebleu

from finetune_assets.evaluation import text_scores
from finetune_assets.evaluation.statistics import Bootstrap, Estimate, Interval, mean, ratio, rows_needed, share


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
    """Nats over bytes, log-normal, rows of a conversation alike: about 95 of 100 intervals hold the truth (0.5)."""
    generator = np.random.default_rng(1)
    held = 0
    trials = 200
    for _ in range(trials):
        size = generator.integers(20, 80, size=120).astype(float)
        own = np.repeat(generator.lognormal(-0.08, 0.4, size=60), 2)
        nats = size * 0.5 * own * generator.lognormal(-0.02, 0.2, size=120)
        found = Bootstrap(clusters(120), resamples=500).interval(Estimate(np.stack([nats, size], axis=1), ratio))
        held += found.low <= 0.5 <= found.high
    assert 0.90 <= held / trials <= 0.985


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


def test_equal_candidates_are_seldom_told_apart():
    """A/A: two candidates of one quality with noise of their own, conversations alike: "better" about 2.5 % of the time."""
    generator = np.random.default_rng(3)
    better = 0
    trials = 200
    for _ in range(trials):
        common = np.repeat(generator.normal(size=60), 2)
        first, second = (list(common + generator.normal(size=120)) for _ in range(2))
        better += Bootstrap(clusters(120), resamples=500).difference(mean(first), mean(second)).low > 0
    assert better / trials <= 0.06


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
    assert bleu == pytest.approx(sacrebleu.corpus_bleu(replies, [references]).score)
    assert chrf == pytest.approx(sacrebleu.corpus_chrf(replies, [references]).score)
    for n, (reply, reference) in enumerate(zip(replies, references, strict=True)):
        expected = sacrebleu.corpus_bleu([reply], [[reference]]).score
        assert float(text_scores.bleu(np.array(made["bleu"][n], float))) == pytest.approx(expected, abs=1e-9)
    assert made["rouge_l"][1] == 0
    assert all(math.isfinite(value) for value in made["rouge_l"])
