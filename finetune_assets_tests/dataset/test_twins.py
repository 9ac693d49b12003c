"""Exact and near-duplicates: which one stays, and that no row order matters."""

from __future__ import annotations

import random

import polars as pl
from rapidfuzz import fuzz

from finetune_assets.corpus.near_duplicates import normalise
from finetune_assets.dataset import choose
from finetune_assets.dataset.duplicates import twins_in
from finetune_assets_tests.dataset.small_corpus import Corpus, dental
from finetune_assets_tests.dataset.test_choose import reasons, row, twin_of

ASK, ANSWER = "¿Me puede decir el precio de una limpieza dental?", "La limpieza dental cuesta cuarenta euros con revisión."
TRAIN, TEST = {"bucket": 9000, "user": "u_train"}, {"bucket": 1, "user": "u_test"}


def test_the_held_out_twin_stays_and_names_whom_it_replaced(corpus: Corpus) -> None:
    corpus.fill()
    train = corpus.example(1, user_text=ASK, reply=ANSWER, **TRAIN)
    test = corpus.example(2, user_text=ASK.lower(), reply=ANSWER + " 😀", **TEST)
    near = corpus.example(3, user_text=ASK, reply=ANSWER.replace("cuarenta", "cuarent"), **TRAIN)
    corpus.rate(train)
    choice = choose(corpus.write(), dental())
    assert reasons(choice)[train] == "exact_duplicate"
    assert reasons(choice)[near] == "near_duplicate"
    assert twin_of(choice, train) == twin_of(choice, near) == test
    assert row(choice, test)["replaced"] == [train, near]


def test_a_correction_outlives_everything_but_a_held_out_correction(corpus: Corpus) -> None:
    corpus.fill()
    kept = corpus.example(1, user_text=ASK, reply="No entiendo.", **TRAIN)
    test = corpus.example(2, user_text=ASK, reply=ANSWER, **TEST)
    corpus.rate(kept, "negative", ANSWER)
    choice = choose(corpus.write(), dental())
    assert row(choice, kept)["reply"] == ANSWER
    assert reasons(choice)[test] == "exact_duplicate"
    held = corpus.example(3, user_text=ASK, reply="No puedo.", **TEST)
    corpus.rate(held, "negative", ANSWER)
    choice = choose(corpus.write(), dental())
    assert row(choice, held)["split"] == "test"
    assert reasons(choice)[kept] == "exact_duplicate"
    assert choice.preferences["message_id"].to_list() == [held]  # the pair in training would be a twin of the held-out one


def test_better_source_then_newest(corpus: Corpus) -> None:
    corpus.fill()
    old_positive = corpus.example(1, user_text=ASK, reply=ANSWER, **TRAIN)
    newer = corpus.example(2, user_text=ASK, reply=ANSWER, **TRAIN)
    corpus.rate(old_positive)
    choice = choose(corpus.write(), dental())
    assert twin_of(choice, newer) == old_positive
    corpus.feedback.clear()
    corpus.rate("msg_01000")  # a week of feedback stays
    choice = choose(corpus.write(), dental())
    assert twin_of(choice, old_positive) == newer


def test_twins_of_a_negative_reply_go_and_its_own_correction_stays(corpus: Corpus) -> None:
    corpus.fill()
    negative = corpus.example(1, user_text=ASK, reply=ANSWER, **TRAIN)
    equal = corpus.example(2, user_text=ASK, reply=ANSWER.upper(), **TRAIN)
    near = corpus.example(3, user_text=ASK, reply=ANSWER.replace("euros", "euro"), **TEST)
    fixed = corpus.example(4, user_text=ASK, reply=ANSWER, **TRAIN)
    corpus.rate(negative, "negative")
    corpus.rate(fixed, "negative", ANSWER.replace("euros", "€"))
    choice = choose(corpus.write(), dental())
    assert reasons(choice)[equal] == reasons(choice)[near] == "same_as_negative"
    assert twin_of(choice, equal) in (negative, fixed)
    assert row(choice, fixed)["source"] == "corrected"
    assert negative not in choice.kept["message_id"]


def test_few_thumbs_that_block_many_replies_are_told(corpus: Corpus) -> None:
    corpus.fill(120)
    messages = [corpus.example(number, user_text=ASK, reply=ANSWER, **TRAIN) for number in range(61)]
    corpus.rate(messages[0], "negative")
    choice = choose(corpus.write(), dental())
    assert any(warning.startswith("60 replies nearly repeat one that was rated badly") for warning in choice.notes["warnings"])


def test_a_negative_reply_that_resembles_a_correction_still_blocks_others(corpus: Corpus) -> None:
    """negative ~ correction and negative ~ other, but correction and other are farther apart than the threshold."""
    corpus.fill()
    base = "La limpieza dental cuesta cuarenta euros con revisión incluida en la clínica del centro"
    negative = corpus.example(1, user_text=ASK, reply=base, **TRAIN)
    other = corpus.example(2, user_text=ASK, reply=base + " y dura media hora", **TRAIN)
    corrected = corpus.example(3, user_text=ASK, reply="No sé.", **TRAIN)
    correction = base.removeprefix("La limpieza dental cue")
    corpus.rate(negative, "negative")
    corpus.rate(corrected, "negative", correction)
    texts = normalise(pl.Series([f"{ASK}\n{t}" for t in (base, base + " y dura media hora", correction)]))
    assert min(fuzz.ratio(texts[0], texts[1]), fuzz.ratio(texts[0], texts[2])) >= 90 > fuzz.ratio(texts[1], texts[2])
    choice = choose(corpus.write(), dental())
    assert reasons(choice)[other] == "same_as_negative"
    assert row(choice, corrected)


def test_no_two_kept_examples_are_twins_and_order_does_not_matter(corpus: Corpus) -> None:
    corpus.fill()
    rng = random.Random(3)
    for number in range(200):
        text = "".join(c for c in ANSWER if rng.random() > 0.03)
        corpus.example(number, user_text=ASK, reply=text + f" {number % 4}", user=f"u_{number % 40}", bucket=number % 40 * 250)
    corpus.rate("msg_00007", "negative")
    corpus.rate("msg_00009")
    first = choose(corpus.write(), dental())
    texts = normalise(first.kept.select(pl.concat_str("user_text", "reply", separator="\n")).to_series()).to_list()
    assert not [1 for i, a in enumerate(texts) for b in texts[:i] if fuzz.ratio(a, b) >= 90]
    rng.shuffle(corpus.examples)
    rng.shuffle(corpus.feedback)
    again = choose(corpus.write(), dental())
    one, other = (each.kept.drop("place").sort("message_id") for each in (again, first))
    assert one.equals(other)
    assert again.dropped.equals(first.dropped)


def test_twins_in_prefers_an_equal_text() -> None:
    some = pl.Series(["hola que tal estas hoy", "", "nada parecido", "hola que tal estas hoi"])
    others = pl.Series(["hola que tal estas hoi", "hola que tal estas hoy", "", ""])
    assert twins_in(some, others, 0.9).tolist() == [1, 2, -1, 0]
    assert twins_in(some, others[:0], 0.9).tolist() == [-1] * 4
