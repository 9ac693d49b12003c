"""Made-up people in one's own texts: who is found, what is replaced needlessly, and that both can be missed."""

from __future__ import annotations

import random

import polars as pl
import pytest
from stdnum import iban, luhn
from stdnum.br import cpf
from stdnum.cl import rut
from stdnum.es import dni

from finetune_assets.corpus import planted
from finetune_assets.corpus.personal_data import KINDS, scrub_conversation
from finetune_assets.corpus.planted_texts import BLIND, DECOYS, SENTENCES, VALUES
from finetune_assets.environment import ROOT

SAMPLE = ROOT / "data" / "sample"


@pytest.fixture(scope="module")
def talks() -> list[list[str]]:
    """Conversations of the sample, scrubbed as the corpus holds them."""
    messages = pl.read_parquet(SAMPLE / "messages.parquet").drop_nulls("content").sort("created_at", "message_id")
    whole = messages.group_by("conversation_id", maintain_order=True).agg("content").rows()
    return [scrub_conversation(texts)[0] for _, texts in whole[:120]]


@pytest.mark.parametrize("language", ["es", "en", "pt"])
def test_planted_people_are_found_and_clean_texts_stay(talks: list[list[str]], language: str) -> None:
    made = planted.measure(talks, language=language, each=12)
    assert made.recall >= 0.99, made.missed
    assert made.needless_share < 0.005, made.needless
    facts = made.as_dict()
    assert facts["planted"] == 12 * len(KINDS)
    assert set(facts["not_looked_for"]) == set(BLIND)
    assert facts == planted.measure(talks, language=language, each=12).as_dict()
    assert facts["not_looked_for"]["street_address"] == {"planted": 12, "found": 0}
    told = list(planted.lines(made))
    assert len(told) == 1 + len(KINDS) + len(BLIND)
    assert "no recogniser looks for it" in told[-1]


def test_what_no_recogniser_knows_lowers_the_recall(talks: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VALUES, "email", lambda *_: "ana en su casa")
    made = planted.measure(talks, each=9)
    assert made.found["email"] == 0
    assert made.recall == pytest.approx((len(KINDS) - 1) / len(KINDS))
    assert {kind for kind, _ in made.missed} == {"email", *BLIND}


def test_what_looks_like_a_phone_counts_as_needless(talks: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECOYS, "es", ((lambda _: "612 345 678", "Son {}."),))
    made = planted.measure(talks[:10], each=1)
    assert len(made.needless) >= sum(len(talk) for talk in talks[:10])


def test_phones_are_those_of_the_regions(talks: list[list[str]]) -> None:
    own = planted.measure(talks, regions=("PT", "PE"), each=16)
    assert own.found["phone"] == 16
    none = planted.measure(talks, regions=(), each=16)
    assert none.found["phone"] == 16  # all with their country's code


def test_values_have_valid_check_digits() -> None:
    draw = random.Random(1)
    for _ in range(200):
        assert luhn.is_valid(VALUES["credit_card"](draw, "es", "").replace(" ", "").replace("-", ""))
        assert iban.is_valid(VALUES["iban"](draw, "es", ""), check_country=False)
        number = VALUES["national_id"](draw, "es", "")
        assert dni.is_valid(number) or rut.is_valid(number) or cpf.is_valid(number)


def test_every_kind_has_sentences_in_every_language() -> None:
    assert set(VALUES) == set(SENTENCES) == {*KINDS, *BLIND}
    assert all(set(patterns) == {"es", "en", "pt"} for patterns in SENTENCES.values())
    assert all(pattern.count("{}") == 1 for patterns in SENTENCES.values() for each in patterns.values() for pattern in each)
    assert planted.measure([], each=2).planted["email"] == 2
