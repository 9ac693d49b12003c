"""Facts of replies: all writings of one thing are one fact, another hour is found out, and people's own replies pass."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_assets.environment import ROOT
from finetune_assets.evaluation.facts import facts, judge, shown, support


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        ("a las 5 de la tarde", "Anoto: a las 17:00."),
        ("a las 17 hs", "Te espero a las 5 de la tarde."),
        ("a las cuatro y media", "Queda a las 16:30."),
        ("a las 7 menos cuarto de la tarde", "Queda a las 18:45."),
        ("8:30 pm", "a las 20.30"),
        ("at half past 5", "See you at 5:30 pm."),
        ("às 5 da tarde", "Marcado para as 17h."),
        ("el viernes 13", "Confirmado para el viernes 13 a nombre de nadie."),
        ("el 13 de mayo", "May 13 it is."),
        ("na sexta-feira", "Te espero el viernes."),
        ("somos dos", "Mesa para 2 personas."),
        ("2", "a table for two people"),
        ("son $ 19.500", "El total es 19500 pesos"),
        ("soy inés", "Gracias, Inés."),
        ("me llamo [NAME_2]", "Perfecto, [NAME_2]."),
        ("mi reserva AB-1234", "Encontré la reserva AB1234."),
    ],
)
def test_one_fact_has_many_writings(said: str, reply: str):
    found = judge(reply, "", [said])
    assert found.stated
    assert not found.unsupported


@pytest.mark.parametrize(
    ("said", "reply", "wrong"),
    [
        ("a las 5 de la tarde", "Anoto: a las 18:00.", "18:00"),
        ("a las 5 de la tarde", "Anoto: a las 5:00 de la mañana.", "5:00"),
        ("el viernes 13", "Confirmado para el jueves 13.", "jueves"),
        ("el 13 de mayo", "Queda para el 14 de mayo.", "14"),
        ("somos dos", "Mesa para 3 personas.", "3"),
        ("soy Inés", "Gracias, Marta.", "marta"),
        ("soy Inés", "Gracias, [NAME].", "[NAME]"),
        ("¿cuánto sale?", "Son 45 €.", "45"),
    ],
)
def test_another_fact_is_found_out(said: str, reply: str, wrong: str):
    found = judge(reply, "Anotado.", [said])
    assert [shown(fact) for fact in found.unsupported] == [wrong]
    assert found.faithful is False


def test_what_is_no_fact():
    for text in ("Te respondemos en 24 horas.", "¿Algo más?", "¡Hola! ¿En qué puedo ayudarte?", "Claro que sí, con gusto.", ""):
        assert not facts(text), text


def test_terms_are_what_the_settings_name():
    terms = ("limpieza|profilaxis", "blanqueamiento")
    assert not judge("Anoto una limpieza.", "", ["quiero una profilaxis"], terms).unsupported
    assert judge("Anoto un blanqueamiento.", "", ["quiero una profilaxis"], terms).unsupported == (("term", "1"),)


def test_only_rows_whose_right_answer_is_in_the_conversation_are_judged():
    offer = judge("A las 13:00 hay lugar.", "A las 15:00 hay lugar.", ["¿qué hora hay?"])
    assert not offer.answerable
    assert offer.faithful is None
    echo = judge("Anoto: lunes.", "Anoto: lunes a las 9:00.", ["el lunes a las 9"])
    assert (echo.expected, echo.repeated, echo.faithful) == (2, 1, True)
    assert judge("Con gusto.", "Claro.", ["hola"]).faithful is None
    assert judge("A las 13:00 hay lugar.", " ", ["hola"]).faithful is None  # no reference: nobody knows what was right


def test_peoples_own_confirmations_pass():
    """On the sample: replies that repeat what was agreed ("a nombre de …") are supported by their conversation."""
    messages = pl.read_parquet(ROOT / "data" / "sample" / "messages.parquet").drop_nulls("content").sort("created_at")
    stated = good = 0
    for _, talk in messages.group_by("conversation_id"):
        texts = talk["content"].to_list()
        for n, (role, text) in enumerate(zip(talk["role"], texts, strict=True)):
            if role == "assistant" and " a nombre de " in text and any(mark in text for mark in ("confirm", "eservad", "gend")):
                hours = {fact for fact in facts(text) if fact[0] in ("hour", "people", "day")}
                context = support(texts[:n])
                stated += len(hours)
                good += sum(context.has(fact) for fact in hours)
        if stated > 1500:
            break
    assert stated > 300
    assert good / stated > 0.85  # one in ten of the sample's replies is planted as wrong


@given(st.integers(0, 23), st.integers(0, 59))
def test_an_hour_supports_itself_and_no_other(hour: int, minute: int):
    text = f"a las {hour}:{minute:02d}"
    context = support([text])
    assert all(context.has(fact) for fact in facts(text))
    other = next(iter(facts(f"a las {(hour + 1) % 24}:{minute:02d}")))
    assert not context.has(other)


@given(st.text(max_size=300))
def test_any_text_is_read(text: str):
    context = support([text])
    assert all(context.has(fact) for fact in facts(text))


def test_of_ten_thousand_characters_the_beginning_is_read():
    from finetune_assets.evaluation.facts import LONGEST

    booking = "la cita a las 5 de la tarde "
    assert facts(booking * 400) >= facts(booking)
    assert facts("a " * 5_000) == frozenset()
    assert facts("x " * (LONGEST // 2 - 20) + booking) == facts(booking)
    assert facts("x " * (LONGEST // 2) + booking) == frozenset()
    assert {kind for kind, _ in facts("1" * 10_000)} == {"code"}


def test_the_frozen_chats_for_forgetting_are_whole():
    import json

    for name in ("es", "en"):
        lines = (Path(ROOT) / "finetune_assets" / "evaluation" / "general" / f"{name}.jsonl").read_text().splitlines()
        chats = [json.loads(line)["messages"] for line in lines]
        assert len(chats) >= 60
        assert all(chat[0]["role"] == "user" and chat[-1]["role"] == "assistant" for chat in chats)
