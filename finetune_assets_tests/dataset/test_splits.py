"""Nothing moves between train and test, whatever is added or removed; no person stands on both sides."""

from __future__ import annotations

import datetime
import random
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_assets.assistants.settings.data import Split
from finetune_assets.dataset import Choice, choose
from finetune_assets.dataset.splits import assign
from finetune_assets_tests.dataset.small_corpus import START, Corpus, dental
from finetune_assets_tests.dataset.test_choose import reasons

DATE = (START + datetime.timedelta(hours=200)).date()
BY_TIME = {"mode": "time", "date": DATE}


def frame(buckets: list[int]) -> pl.DataFrame:
    return pl.DataFrame({"bucket": buckets}, schema={"bucket": pl.UInt16})


def test_the_first_buckets_are_test_the_next_validation() -> None:
    split = assign(frame([0, 999, 1000, 1999, 2000, 9999]), Split())["split"].to_list()
    assert split == ["test", "test", "validation", "validation", "train", "train"]


@given(st.integers(0, 100), st.integers(0, 100))
def test_shares_are_kept_and_a_bucket_has_one_split(test: int, validation: int) -> None:
    test, validation = (test, validation) if test + validation <= 100 else (100 - test, 100 - validation)
    shares = Split(train=(100 - test - validation) / 100, test=test / 100, validation=validation / 100)
    split = assign(frame(list(range(10_000))), shares)["split"]
    assert [int((split == name).sum()) for name in ("test", "validation")] == [100 * test, 100 * validation]


def _talk(corpus: Corpus) -> None:
    rng = random.Random(5)
    for number in range(400):
        copy_of = number - rng.randrange(1, 20) if number > 30 and rng.random() < 0.3 else number
        texts = {k: corpus.examples[copy_of][k] for k in ("user_text", "reply", "context")} if copy_of != number else {}
        user = f"u_{rng.randrange(90)}" if rng.random() < 0.9 else None
        message = corpus.example(number, user=user, conversation_id=f"conv_{user}_{number // 4}" if user else None, **texts)
        corpus.examples[-1]["conversation_id"] = corpus.examples[-1]["conversation_id"] or f"conv_n{number}"
        if rng.random() < 0.2:
            corpus.rate(
                message, rng.choice(["positive", "negative"]), rng.choice([None, f"Corrección número {number} del equipo"])
            )


@pytest.fixture(scope="module", params=["user", "time"])
def talk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Choice, dict[str, object]]:
    corpus = Corpus(tmp_path_factory.mktemp("talk"))
    _talk(corpus)
    given_split = BY_TIME if request.param == "time" else {"mode": "user"}
    return corpus, choose(corpus.write(), dental(min_examples=20, split=given_split)), given_split


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_removing_or_adding_a_tenth_of_the_conversations_moves_no_example(
    talk: tuple[Corpus, Choice, dict[str, object]], tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    corpus, before, split = talk
    rng = random.Random(seed)
    conversations = sorted({row["conversation_id"] for row in corpus.examples})
    gone = set(rng.sample(conversations, len(conversations) // 10))
    smaller = Corpus(Path(tmp_path_factory.mktemp("smaller")))
    smaller.examples = [row for row in corpus.examples if row["conversation_id"] not in gone]
    smaller.feedback = [row for row in corpus.feedback if row["conversation_id"] not in gone]
    after = choose(smaller.write(), dental(min_examples=20, split=split))
    both = before.kept.select("message_id", old="split").join(after.kept.select("message_id", new="split"), on="message_id")
    assert both.height > 100
    assert both.filter(pl.col("old") != pl.col("new")).is_empty()


def test_by_time_a_person_of_the_test_set_is_not_trained_on(talk: tuple[Corpus, Choice, dict[str, object]]) -> None:
    _, choice, split = talk
    users = {name: set(part["user"].drop_nulls()) for (name,), part in choice.kept.group_by("split")}
    assert not users["train"] & (users["test"] | users["validation"])
    assert not users["validation"] & users["test"]
    by_time = split["mode"] == "time"
    assert ("user_in_test" in reasons(choice).values()) == by_time
    if by_time:
        start = datetime.datetime.combine(DATE, datetime.time(), datetime.UTC)
        late = choice.kept["created_at"] >= start + datetime.timedelta(minutes=5)
        assert ((choice.kept["split"] == "test") == late).all()


def test_pairs_of_a_person_of_the_test_set_are_held_out(corpus: Corpus) -> None:
    corpus.fill(200)
    late = START + datetime.timedelta(days=90)
    early = corpus.example(1, user="u_both", bucket=9000)
    corpus.example(2, user="u_both", bucket=9000, started_at=late)
    corpus.rate(early, "negative", "El sábado abrimos a las nueve y media")
    choice = choose(corpus.write(), dental(split={"mode": "time", "date": late.date()}))
    assert reasons(choice)[early] == "user_in_test"
    assert choice.preferences.select("message_id", "split").rows() == [(early, "test")]
