"""What becomes an example and what is dropped, with which reason."""

from __future__ import annotations

import datetime
import random
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.corpus.schema import FEEDBACK
from finetune_assets.dataset import Choice, choose
from finetune_assets.dataset.build import REASONS
from finetune_assets.dataset.selection import FEEDBACK_COLUMNS, judge, matches
from finetune_assets.errors import NothingSelected, TooFewExamples
from finetune_assets_tests.dataset.small_corpus import START, Corpus, dental


def reasons(choice: Choice) -> dict[str, str]:
    return dict(choice.dropped.select("message_id", "reason").rows())


def twin_of(choice: Choice, message_id: str) -> str | None:
    return choice.dropped.filter(pl.col("message_id") == message_id)["kept_message_id"].item()


def row(choice: Choice, message_id: str) -> dict[str, Any]:
    own = choice.kept.filter(pl.col("message_id") == message_id)
    return pl.concat(choice.contexts(own)).row(0, named=True)


def test_each_reason_is_recorded_and_every_example_is_kept_or_dropped(corpus: Corpus) -> None:
    corpus.fill()
    expected = {
        corpus.example(1, tenant_id="clinic_out"): "tenant_excluded",
        corpus.example(2, training_consent=False): "no_consent",
        corpus.example(12, channel="simulated"): "simulated",
        corpus.example(3): "negative_feedback",
        corpus.example(4, satisfaction_score=3): "not_satisfied",
        corpus.example(5, satisfaction_score=None): "not_satisfied",
        corpus.example(6, user_text="hey", user_chars=3): "user_too_short",
        corpus.example(7, user_chars=501): "user_too_long",
        corpus.example(8, reply="Muy bien"): "reply_too_short",
        corpus.example(9, reply="bien " * 300): "reply_too_long",
        corpus.example(10, error_reply=True): "error_reply",
        corpus.example(11, intent="booking", user_text="Quiero ver al doctor"): "required_pattern_missing",
        corpus.example(13, reply="Puede escribir a ana.perez@example.org cuando guste."): "personal_data_residual",
    }
    fits = corpus.example(14, intent="booking", user_text="Quiero una CITA para hoy, por favor")
    corpus.rate("msg_00003", "negative")
    corpus.rate("msg_00012", "negative", "Así lo dice el conjunto de prueba, con todas sus palabras.")  # not even a correction
    filters = {"exclude_tenants": ["clinic_out"], "require": {"booking": "cita|hora"}}
    choice = choose(corpus.write(), dental(filters=filters, augment={"share": 0}))
    dropped = reasons(choice)
    assert {m: dropped.get(m) for m in expected} == expected
    assert row(choice, fits)["source"] == "satisfied"
    assert choice.kept.height + choice.dropped.height == len(corpus.examples) == choice.notes["read"]
    assert choice.notes["funnel"][-1]["left"] == choice.kept.height
    assert set(dropped.values()) <= set(REASONS)
    assert choice.notes["rejected"] == dict(choice.dropped["reason"].value_counts().rows())


def test_without_a_least_score_none_is_asked_for(corpus: Corpus) -> None:
    corpus.fill()
    unrated, low, bad = (corpus.example(n, satisfaction_score=score) for n, score in ((1, None), (2, 1), (3, None)))
    corpus.rate(bad, "negative")
    choice = choose(corpus.write(), dental(filters={"min_satisfaction": None}))
    assert [row(choice, one)["source"] for one in (unrated, low)] == ["satisfied", "satisfied"]
    assert dict(choice.dropped.select("message_id", "reason").rows()) == {bad: "negative_feedback"}


def test_patterns_of_the_settings_replace_the_default_list(corpus: Corpus) -> None:
    corpus.fill()
    error = corpus.example(1, error_reply=True)
    odd = corpus.example(2, reply="Escríbanos por FAX a la clínica")
    ahead = corpus.example(3, reply="Nuestro telex no existe ya, lo siento mucho")
    choice = choose(corpus.write(), dental(filters={"exclude": ["fax", r"telex(?! si)"]}))
    assert row(choice, error)
    assert reasons(choice)[odd] == reasons(choice)[ahead] == "excluded_pattern"


def test_look_around_falls_back_to_python() -> None:
    assert matches(pl.Series(["Foo bar", "foo", None]), "foo(?= BAR)").to_list() == [True, False, False]


def test_sources_in_their_order(corpus: Corpus) -> None:
    corpus.fill()
    satisfied = corpus.example(1)
    positive = corpus.example(2, satisfaction_score=1)
    corrected = corpus.example(3, satisfaction_score=1, error_reply=True)
    imported = corpus.example(4, satisfaction_score=None, kind="imported")
    corpus.rate(positive)
    corpus.rate(corrected, "negative", "  Abrimos el sábado a las nueve.  ")
    choice = choose(corpus.write(), dental())
    sources = {m: row(choice, m)["source"] for m in (satisfied, positive, corrected, imported)}
    assert list(sources.values()) == ["satisfied", "positive", "corrected", "imported"]
    assert row(choice, corrected)["reply"] == "Abrimos el sábado a las nueve."


def test_a_correction_passes_all_but_the_upper_bound(corpus: Corpus) -> None:
    corpus.fill()
    short = corpus.example(1, user_text="no", user_chars=2, intent="booking")
    long = corpus.example(2)
    corpus.rate(short, "negative", "Vale.")
    corpus.rate(long, "negative", "a bien " * 200)
    choice = choose(corpus.write(), dental(filters={"require": {"booking": "cita"}}))
    assert row(choice, short)["reply"] == "Vale."
    assert reasons(choice)[long] == "reply_too_long"
    assert long not in choice.preferences["message_id"]


@pytest.mark.parametrize(
    ("thumbs", "result"),
    [
        ([("positive", 0), ("negative", 1)], "negative_feedback"),
        ([("negative", 0), ("positive", 1)], "positive"),
        ([("negative", 0), ("positive", 0)], "negative_feedback"),
        ([("positive", 0), ("negative", 0)], "negative_feedback"),
    ],
)
def test_the_newest_feedback_decides_and_ties_are_negative(corpus: Corpus, thumbs: list[tuple[str, int]], result: str) -> None:
    corpus.fill()
    message = corpus.example(1, satisfaction_score=1)
    for kind, day in thumbs:
        corpus.rate(message, kind, created_at=START + datetime.timedelta(days=day))
    choice = choose(corpus.write(), dental())
    kept = choice.kept.filter(pl.col("message_id") == message)["source"].to_list()
    assert (kept or [reasons(choice)[message]]) == [result]


def test_a_correction_counts_however_old_and_the_newest_one_wins(corpus: Corpus) -> None:
    corpus.fill()
    message = corpus.example(1)
    corpus.rate(message, "negative", "La primera corrección del equipo.", created_at=START)
    corpus.rate(message, "negative", "La segunda corrección del equipo.", created_at=START + datetime.timedelta(days=1))
    corpus.rate(message, "negative", " ", created_at=START + datetime.timedelta(days=2))
    corpus.rate(message, "positive", created_at=START + datetime.timedelta(days=3))
    choice = choose(corpus.write(), dental())
    assert row(choice, message)["reply"] == "La segunda corrección del equipo."


def test_a_correction_that_repeats_the_reply_counts_by_its_type(corpus: Corpus) -> None:
    corpus.fill()
    liked = corpus.example(1, reply="Abrimos a las  nueve.", satisfaction_score=1)
    disliked = corpus.example(2, reply="Cerramos a las siete.")
    corpus.rate(liked, "positive", " Abrimos a las nueve. ")
    corpus.rate(disliked, "negative", "Cerramos a las siete.")
    choice = choose(corpus.write(), dental())
    assert row(choice, liked)["source"] == "positive"
    assert reasons(choice)[disliked] == "negative_feedback"
    assert choice.preferences.is_empty()


def test_feedback_of_another_tenant_is_ignored_and_counted(corpus: Corpus) -> None:
    corpus.fill()
    message = corpus.example(1)
    corpus.rate(message, "negative", "Texto ajeno que no debe contar", tenant_id="clinic_b")
    corpus.rate("msg_gone", "positive")
    choice = choose(corpus.write(), dental())
    assert row(choice, message)["source"] == "satisfied"
    assert choice.notes["feedback"]["ignored"] == {"tenant_mismatch": 1, "no_example": 1}


def test_context_is_cut_from_the_oldest_turn_and_starts_with_the_user(corpus: Corpus) -> None:
    corpus.fill()
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turno {n} " + "x" * 40} for n in range(7)]
    by_turns = corpus.example(1, context=turns, user_text=turns[-1]["content"])
    huge = [*turns[:2], {"role": "user", "content": "palabra " * 50}]
    by_chars = corpus.example(2, context=huge, user_text=huge[-1]["content"], user_chars=400)
    choice = choose(corpus.write(), dental(filters={"context_turns": 4, "context_chars": 100}))
    assert row(choice, by_turns)["context"] == turns[-1:]
    assert row(choice, by_chars)["context"] == huge[-1:]
    choice = choose(corpus.store, dental(filters={"context_turns": 4}))
    assert row(choice, by_turns)["context"] == turns[-3:]


def test_nothing_selected_names_what_is_there(corpus: Corpus) -> None:
    corpus.fill()
    with pytest.raises(NothingSelected, match=r"vertical: hotel.*dental \(clinic_a\)"):
        choose(corpus.write(), dental(select={"vertical": "hotel"}))


def test_an_empty_corpus_says_what_to_materialise(corpus: Corpus) -> None:
    with pytest.raises(NothingSelected, match="clean_examples"):
        choose(corpus.store, dental())


def test_too_few_examples_are_refused_with_their_reasons(corpus: Corpus) -> None:
    corpus.fill(60)
    corpus.fill(30, first=5000, satisfaction_score=2)
    with pytest.raises(TooFewExamples, match=r"keeps 60 of 90.*min_examples` is 100.*not_satisfied 30"):
        choose(corpus.write(), dental())
    choice = choose(corpus.store, dental(min_examples=50))
    assert "under 1,000" in choice.notes["warnings"][0]


def test_an_empty_test_split_is_refused(corpus: Corpus) -> None:
    corpus.fill(120, user="u_one", bucket=9999)
    with pytest.raises(TooFewExamples, match=r"by 1 users none falls into test"):
        choose(corpus.write(), dental())


def test_one_tenant_and_a_window_of_weeks(corpus: Corpus) -> None:
    corpus.fill(150)
    corpus.fill(150, first=8000, tenant_id="clinic_b")
    store = corpus.write()
    choice = choose(store, dental(name="clinic_b", select={"tenant": "clinic_b"}))
    assert choice.notes["counts"]["tenant"] == {"clinic_b": 150}
    weeks = store.weeks("examples")
    window = choose(store, dental(window_weeks=2, min_examples=1, split={"train": 0.5, "validation": 0.25, "test": 0.25}))
    assert window.notes["weeks"] == weeks[-1:] or window.notes["weeks"] == weeks[-2:]
    assert window.notes["read"] < 300


def test_people_who_disagree_are_counted_and_the_correction_wins(corpus: Corpus) -> None:
    corpus.fill()
    both, corrected, praised = corpus.example(1), corpus.example(2), corpus.example(3)
    day = datetime.timedelta(days=1)
    corpus.rate(both, "positive", created_at=START)
    corpus.rate(both, "negative", created_at=START + day)
    corpus.rate(corrected, "negative", "La primera corrección del equipo.", created_at=START)
    corpus.rate(corrected, "negative", "Otra cosa muy distinta se corrige.", created_at=START + day)
    corpus.rate(praised, "negative", "Un texto mejor para el cliente.", created_at=START)
    corpus.rate(praised, "positive", created_at=START + day)
    choice = choose(corpus.write(), dental())
    assert choice.notes["feedback"]["conflicts"] == {"both_thumbs": 2, "several_corrections": 1, "corrected_and_praised": 1}
    assert row(choice, praised)["reply"] == "Un texto mejor para el cliente."
    pairs = choice.preferences.select("message_id", "chosen").sort("message_id").rows()
    assert pairs == [(corrected, "Otra cosa muy distinta se corrige."), (praised, "Un texto mejor para el cliente.")]
    bad = choice.kto.filter(~pl.col("label"))["message_id"].to_list()
    assert sorted(bad) == [both, corrected]  # the newest thumb of the third one is up


def test_rows_that_contradict_each_other_are_resolved(corpus: Corpus) -> None:
    """Two messages, the same request: one corrects A to B, the later one B to A; and B is rated badly elsewhere."""
    corpus.fill()
    ask = {
        "user_text": "¿Abren el sábado por la tarde?",
        "context": [{"role": "user", "content": "¿Abren el sábado por la tarde?"}],
    }
    yes, no = "Sí, abrimos el sábado de tres a siete.", "El sábado por la tarde está cerrado."
    older = corpus.example(1, reply=yes, bucket=9000, user="u_1", **ask)
    newer = corpus.example(2, reply=no, bucket=9000, user="u_1", **ask)
    disliked = corpus.example(3, reply=yes, bucket=9000, user="u_1", **ask)
    corpus.rate(older, "negative", no)
    corpus.rate(newer, "negative", yes)
    corpus.rate(disliked, "negative")
    choice = choose(corpus.write(), dental())
    assert choice.preferences.select("message_id", "chosen").rows() == [(newer, yes)]
    labels = choice.kto.filter(pl.col("message_id").is_in([older, newer, disliked])).select("completion", "label").rows()
    assert sorted(labels) == [(no, True), (yes, True)]
    left_out = choice.notes["pairs"]["left_out"]
    assert left_out["preferences"]["contradicted"] == 1
    assert left_out["kto"]["contradicted"] >= 2


def test_pairs_of_many_turns_keep_every_turn_in_order(corpus: Corpus) -> None:
    corpus.fill()
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turno {n}"} for n in range(7)]
    message = corpus.example(1, context=turns, user_text="turno 6")
    corpus.rate(message, "negative", "La respuesta que tocaba dar aquí.")
    choice = choose(corpus.write(), dental())
    assert choice.preferences["context"].to_list() == [turns]
    assert choice.kto.filter(pl.col("message_id") == message)["context"].to_list() == [turns, turns]


@st.composite
def judgements(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Feedback on two messages, of few texts and few instants, so that ties and contradictions are common."""
    return [
        {
            "feedback_id": f"f{number}",
            "tenant_id": draw(st.sampled_from(("t", "t", "other"))),
            "message_id": draw(st.sampled_from(("m1", "m2", "gone"))),
            "feedback_type": draw(st.sampled_from(("positive", "negative"))),
            "expected_response": draw(st.sampled_from((None, "", " ", "dicho", " dicho ", "mejor", "mejor aún", "\u0000", "🦷"))),
            "created_at": START + datetime.timedelta(days=draw(st.integers(0, 2))),
        }
        for number in range(draw(st.integers(1, 8)))
    ]


@settings(max_examples=150, deadline=None)
@given(judgements(), st.randoms(use_true_random=False))
def test_the_order_of_feedback_never_matters(given_rows: list[dict[str, Any]], rng: random.Random) -> None:
    examples = pl.DataFrame({"message_id": ["m1", "m2"], "tenant_id": ["t", "t"], "reply": ["dicho", "otra cosa"]})
    first = judge(examples, _frame(given_rows), ["t"])
    shuffled = list(given_rows)
    rng.shuffle(shuffled)
    again = judge(examples, _frame(shuffled), ["t"])
    assert again.messages.equals(first.messages)
    assert (again.read, again.ignored, again.conflicts) == (first.read, first.ignored, first.conflicts)
    for message, verdict, expected in first.messages.rows():
        mine = [row for row in given_rows if row["message_id"] == message and row["tenant_id"] == "t"]
        newest = max(row["created_at"] for row in mine)
        last = {row["feedback_type"] for row in mine if row["created_at"] == newest}
        assert verdict == ("negative" if "negative" in last else "positive")
        said = {"m1": "dicho", "m2": "otra cosa"}[message]
        texts = {(row["expected_response"] or "").strip() for row in mine} - {"", said}
        assert (expected in texts) if texts else expected is None


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={name: FEEDBACK[name] for name in FEEDBACK_COLUMNS})
