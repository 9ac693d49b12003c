"""Rules on a reply's form: JSON, length, language; and the languages that texts of the project are in."""

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from finetune_assets.assistants.load import load_assistant
from finetune_assets.assistants.reference import tables
from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import Rule
from finetune_assets.errors import SettingsError
from finetune_assets.evaluation.benchmark import GENERAL
from finetune_assets.evaluation.language import language_of
from finetune_assets.evaluation.rules import breaks, forbidden, holds
from finetune_assets.evaluation.suite import Case, judge_case

DEEP = "[" * 100_000

PORTUGUESE = (
    "Olá! Você pode vir amanhã às 10h?",
    "Sua consulta foi marcada, muito obrigada.",
    "Não temos horário hoje, mas temos na quinta-feira.",
    "A limpeza custa 200 reais com a dentista Ana.",
    "Qual é o seu nome, por favor?",
)


@pytest.mark.parametrize(
    ("asked", "kept", "broken"),
    [
        ({"json": True}, ['{"people": 2}', " [1]\n", '"sí"'], ["", "{people: 2}", '{"a": 1} y ya', "NaN", DEEP]),
        ({"min_chars": 3}, ["día", "  ¿sí?  "], ["", "no", "  no  "]),
        ({"max_chars": 3}, ["", "día", " día\n"], ["días", "x" * 10_000]),
        ({"language": "es"}, ["¿Cuándo quiere venir con usted?", "Ok.", "", "[NAME]"], [PORTUGUESE[0], "We have it for you."]),
        ({"language": "pt"}, [*PORTUGUESE], ["¿Cuándo quiere usted la cita?", "What time would you like?"]),
        (
            {"language": "en"},
            ["Your table at El Charro is booked.", "Sure!"],
            [*PORTUGUESE[:2], "Lo siento, no puedo ayudar con eso."],
        ),
        ({"max_chars": 5, "contains_any": ["hola"]}, ["Hola."], ["hola a todos", "buenas"]),
    ],
)
def test_form(asked: dict[str, object], kept: list[str], broken: list[str]):
    rule = Rule.model_validate({"name": "form", **asked})
    assert [text for text in kept if not holds(rule, text)] == []
    assert [text[:40] for text in broken if holds(rule, text)] == []


@pytest.mark.parametrize(
    ("asked", "question", "reply", "broken"),
    [
        ({"not_contains": ["garantiz"], "contains_any": ["hola"]}, "", "Le garantizo", True),
        ({"contains_any": ["hola"]}, "", "Adiós", False),
        ({"max_chars": 3, "contains_any": ["hola"]}, "", "Adiós", True),
        ({"json": True, "when": "pedido"}, "Mi PEDIDO", "Sí", True),
        ({"json": True, "when": "pedido"}, "Hola", "Sí", False),
        ({"language": "es"}, "", PORTUGUESE[0], True),
        ({"language": "es"}, "", "Ok.", False),
        ({"max_chars": 3, "intent": "pricing"}, "", "Cuesta", False),
    ],
)
def test_which_rules_a_live_reply_is_held_against(asked: dict[str, object], question: str, reply: str, broken: bool):
    assert breaks(Rule.model_validate({"name": "live", **asked}), question, reply) is broken


@pytest.mark.parametrize("asked", [{}, {"json": False}, {"min_chars": 9, "max_chars": 3}, {"language": "fr"}, {"max_chars": 0}])
def test_a_rule_that_says_nothing_or_cannot_hold_is_refused(asked: dict[str, object]):
    with pytest.raises(ValidationError):
        Rule.model_validate({"name": "form", **asked})


@pytest.mark.parametrize("language", ["es", "en"])
def test_everyday_talk_is_in_its_language_where_it_tells(language: str):
    lines = (GENERAL / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    told = [language_of(message["content"]) for line in lines for message in json.loads(line)["messages"]]
    assert {*told} == {language, None}
    assert told.count(language) > len(told) / 2


def test_mixtures_and_addresses_do_not_tell():
    assert language_of("Su reserva en The House of the Rising Sun") is None
    assert language_of("Escriba a on@with.for.com o en www.the.of.com") is None
    assert [language_of(text) for text in PORTUGUESE].count("pt") >= 4
    assert language_of("a " * 10_000_000) is None


def test_what_is_forbidden_is_not_what_is_ill_formed():
    rule = Rule.model_validate({"name": "r", "not_contains": ["garantiz"], "max_chars": 10})
    assert not holds(rule, "una respuesta larga")
    assert not forbidden(rule, "una respuesta larga")
    assert forbidden(rule, "Garantizado")


def test_settings_write_and_read_the_key_as_it_is_said(tmp_path: Path):
    made = Assistant.model_validate({"name": "dental", "select": {"vertical": "dental"}, "rules": [{"name": "r", "json": True}]})
    assert Assistant.model_validate(made.model_dump()) == made
    assert "| `json` | `false` |" in tables()
    assert "json_" not in tables()
    file = {"select": {"vertical": "dental"}, "rules": [{"name": "r", "jsn": True}]}
    (tmp_path / "dental.yaml").write_text(yaml.safe_dump(file))
    with pytest.raises(SettingsError, match=r"unknown key `rules.0.jsn`; allowed here: .*\bjson, language"):
        load_assistant(tmp_path, "dental")


def test_a_case_is_no_json_however_deep():
    assert judge_case(Case.model_validate({"name": "a", "prompt": "hola", "json": True}), DEEP).passed is False
