"""Refusals that name numbers and mends, and how varied and how near to what is really asked the rows are."""

from __future__ import annotations

import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_assets.assistants.settings.data import Minimum
from finetune_assets.dataset import check_objectives, choose, freeze
from finetune_assets.dataset.coverage import coverage, divergence, diversity, words
from finetune_assets.errors import TooFewExamples
from finetune_assets_tests.dataset.small_corpus import Corpus, dental

COUNTS = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 50))


def test_each_minimum_is_named_with_its_number(corpus: Corpus) -> None:
    corpus.fill(150)
    minimum = {"train_rows": 140, "test_conversations": 40, "per_intent": {"pricing": 60, "hours": 10}}
    with pytest.raises(TooFewExamples) as refusal:
        choose(corpus.write(), dental(minimum=minimum))
    for text in (
        "training rows, `minimum.train_rows` is 140",
        "test conversations, `minimum.test_conversations` is 40",
        "of intent pricing, `minimum.per_intent` asks for 60",
        "lower these settings",
    ):
        assert text in str(refusal.value)
    assert "intent hours" not in str(refusal.value)
    assert choose(corpus.store, dental(minimum={"train_rows": 60, "per_intent": {"hours": 10}})).kept.height == 150


def test_an_objective_without_its_rows_is_refused() -> None:
    minimum = Minimum(preference_pairs=20, thumbs=30)
    pairs = {"preferences": {"train": 19, "test": 90}, "kto_labels": {"good": 300, "bad": 29}}
    check_objectives("dental", ["sft"], pairs, minimum)
    with pytest.raises(TooFewExamples, match=r"dpo needs 20 preference pairs.*there are 19\..*expected_response"):
        check_objectives("dental", ["sft", "dpo"], pairs, minimum)
    with pytest.raises(TooFewExamples, match=r"kto needs 30 good and as many bad.*there are 300 and 29\."):
        check_objectives("dental", ["sft", "kto"], pairs, minimum)
    enough = {"preferences": {"train": 20}, "kto_labels": {"good": 30, "bad": 30}}
    check_objectives("dental", ["sft", "dpo", "kto"], enough, minimum)


@given(COUNTS, COUNTS)
def test_divergence_is_a_bounded_symmetric_distance(one: dict[str, int], other: dict[str, int]) -> None:
    value = divergence(one, other)
    assert 0 <= value <= 1
    assert value == pytest.approx(divergence(other, one))
    assert divergence(one, {k: 3 * n for k, n in one.items()}) == pytest.approx(0)
    if one and other and not one.keys() & other.keys():
        assert value == pytest.approx(1)


def test_divergence_of_a_known_pair() -> None:
    half = 0.75 * math.log2(0.75 / 0.625) + 0.25 * math.log2(0.25 / 0.375)
    rest = 0.5 * math.log2(0.5 / 0.625) + 0.5 * math.log2(0.5 / 0.375)
    assert divergence({"a": 3, "b": 1}, {"a": 1, "b": 1}) == pytest.approx((half + rest) / 2)


def test_diversity_counts_words_and_neighbours() -> None:
    assert words(pl.Series(["¡Hola, hola!", ""])).rows() == [(0, "hola"), (0, "hola")]
    found = diversity(pl.Series(["hola hola hola", "hola mundo"]))
    assert found == {"texts": 2, "words": 5, "vocabulary": 2, "distinct_1": 0.4, "distinct_2": 0.6667}
    assert diversity(pl.Series([], dtype=pl.String))["distinct_2"] == 0


def test_coverage_of_what_is_really_asked(corpus: Corpus) -> None:
    corpus.fill(120)
    for number in range(40):
        corpus.example(number, intent="insurance", satisfaction_score=1, user_text=f"seguro convenio {number}", user_chars=20)
    choice = choose(corpus.write(), dental())
    found = choice.notes["coverage"]
    assert found["intents_missing"] == {"insurance": 40}
    assert found["intent_divergence"] > 0.1
    assert 0 < found["words_covered"] < 1
    same = choice.kept.with_columns(split=pl.lit("train"))
    assert coverage(same["intent"], same, same) == {
        "intent_divergence": 0,
        "intents_missing": {},
        "word_divergence": 0,
        "words_covered": 1,
    }


def test_drift_is_measured_against_the_set_before(corpus: Corpus) -> None:
    corpus.fill(150)
    assistant = dental()
    first = freeze(corpus.write(), assistant, choose(corpus.store, assistant))
    assert "drift" not in first
    corpus.fill(60, first=5000, intent="insurance")
    corpus.examples = corpus.examples[10:]
    drift = freeze(corpus.write(), assistant, choose(corpus.store, assistant))["drift"]
    assert (drift["against"], drift["rows_added"], drift["rows_removed"]) == (first["fingerprint"], 60, 10)
    assert drift["intents"] > 0.1
    assert drift["user_words"] < drift["user_words_noise"] < 1
