"""Caps and the share of negative examples: what goes, with which reason, and that only training rows go."""

from __future__ import annotations

import random

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_assets.dataset import choose
from finetune_assets.dataset.balance import cap_of
from finetune_assets.errors import DataError
from finetune_assets_tests.dataset.small_corpus import Corpus, dental
from finetune_assets_tests.dataset.test_choose import reasons

NO_SYNTHETIC = {"share": 0}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0.02, 0.98))
def test_a_share_is_held_by_the_largest_cap_there_is(counts: list[int], share: float) -> None:
    fits = [c for c in range(1, max(counts) + 1) if c <= share * sum(min(n, c) for n in counts) + 1e-9]
    if fits:
        assert cap_of(counts, share, "x") == max(fits)
    else:
        with pytest.raises(DataError, match=rf"x is .*{len(counts)} groups"):
            cap_of(counts, share, "x")


def test_the_best_source_stays_and_held_out_rows_are_never_capped(corpus: Corpus) -> None:
    corpus.fill(300, intent="scheduling")
    corpus.fill(60, first=3000, intent="pricing")
    praised = [f"msg_{n:05d}" for n in range(1000, 1040)]
    for message in praised:
        corpus.rate(message)
    free = choose(corpus.write(), dental(augment=NO_SYNTHETIC)).kept
    capped = choose(corpus.store, dental(augment=NO_SYNTHETIC, balance={"max_per_intent": 90}))
    assert set(reasons(capped).values()) == {"intent_cap"}
    train = capped.kept.filter(pl.col("split") == "train")
    assert dict(train["intent"].value_counts().rows())["scheduling"] == 90
    held = pl.col("split") != "train"
    assert sorted(capped.kept.filter(held)["message_id"]) == sorted(free.filter(held)["message_id"])
    trained = set(free.filter(~held)["message_id"]) & set(praised)
    assert trained <= set(train["message_id"])
    assert capped.kept.height + capped.dropped.height == 360
    random.Random(4).shuffle(corpus.examples)
    again = choose(corpus.write(), dental(augment=NO_SYNTHETIC, balance={"max_per_intent": 90}))
    assert again.dropped.equals(capped.dropped)


def test_a_share_of_the_training_rows_by_tenant(corpus: Corpus) -> None:
    corpus.fill(200)
    corpus.fill(70, first=4000, tenant_id="clinic_b")
    choice = choose(corpus.write(), dental(augment=NO_SYNTHETIC, balance={"max_per_tenant": 0.6}))
    sizes = dict(choice.kept.filter(pl.col("split") == "train")["tenant_id"].value_counts().rows())
    assert sizes["clinic_a"] / sum(sizes.values()) <= 0.6 < (sizes["clinic_a"] + 1) / (sum(sizes.values()) + 1)
    assert set(reasons(choice).values()) == {"tenant_cap"}
    with pytest.raises(DataError, match=r"balance.max_per_tenant is 0.3, but there are 2 groups"):
        choose(corpus.store, dental(balance={"max_per_tenant": 0.3}))


def test_negative_examples_are_kept_in_their_share(corpus: Corpus) -> None:
    corpus.fill(150)
    for number in range(60):
        corpus.example(number, reply=f"Lo siento, de eso se ocupa el equipo {number * 7919} de la clínica")
    balance = {"negative_share": 0.1, "negative_patterns": ["se ocupa el equipo"]}
    choice = choose(corpus.write(), dental(balance=balance, augment=NO_SYNTHETIC))
    train = choice.kept.filter(pl.col("split") == "train")
    negative = train["reply"].str.contains("se ocupa el equipo").sum()
    assert negative == (train.height - negative) // 9
    assert choice.notes["negatives"] == {"rows": negative, "share": round(negative / train.height, 4)}
    assert "negative_share" in reasons(choice).values()
    few = choose(corpus.store, dental(balance=balance | {"negative_share": 0.9}, augment=NO_SYNTHETIC))
    assert "negative_share" not in reasons(few).values()
    assert any("`balance.negative_share` is 90%" in warning for warning in few.notes["warnings"])


@pytest.mark.parametrize(
    "balance", [{"negative_share": 0.1}, {"max_per_intent": 1.0}, {"max_per_tenant": 0}, {"negative_patterns": ["("]}]
)
def test_settings_that_make_no_sense_are_refused(balance: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        dental(balance=balance)
