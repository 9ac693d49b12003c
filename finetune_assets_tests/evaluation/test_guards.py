"""Guards: forgetting, secrets, the standing suite, another tenant's data."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune_assets.corpus.forms import calls_text
from finetune_assets.errors import SettingsError
from finetune_assets.evaluation.guards import canaries, forgetting, guards, overfitting
from finetune_assets.evaluation.isolation import foreign, own_facts
from finetune_assets.evaluation.statistics import Interval
from finetune_assets.evaluation.suite import Case, judge_case, read_suite


def chats(nats: float) -> list[dict]:
    return [{"nats": nats * (1 + n % 5 / 10), "bytes": 50, "tokens": 20} for n in range(60)]


def test_forgetting_is_the_rise_over_the_base():
    found = forgetting(chats(12), chats(10))
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2)  # every chat rose alike
    assert forgetting(chats(10), chats(10)).value == 0
    assert forgetting(None, chats(1)).value is None
    assert forgetting([{"nats": None}], [{"nats": 1.0}]).value is None


def test_a_secret_counts_when_it_is_said_or_beyond_chance():
    def one(rank: int, said: bool = False) -> dict:
        return {"rank": rank, "of": 128, "said": said}

    assert canaries([one(60)], [one(60)]).value == 0
    assert canaries([one(1)], [one(60)]).value == 1
    assert canaries([one(50, said=True)], [one(60)]).value == 1
    assert canaries([one(1, said=True)], [one(1)]).value == 0  # the base guesses it: nothing was learnt
    assert canaries([one(1), *[one(64)] * 9], [one(60)] * 10).value == 0  # one of ten at 1/128: chance
    assert canaries([one(1), one(1), *[one(64)] * 8], [one(60)] * 10).value == 2
    assert canaries(None, None).value is None


def test_a_secret_that_could_not_be_asked_is_not_known_to_be_unknown():
    def one(rank: int | None, of: int | None, said: bool | None = False) -> dict:
        return {"rank": rank, "of": of, "said": said}

    def ends(mine: list[dict], base: list[dict] | None = None) -> tuple:
        found = canaries(mine, base)
        return found.low, found.value, found.high

    too_long, silent, quiet, told = one(None, 1), one(None, None, None), one(None, None), one(None, None, True)
    assert ends([too_long, one(60, 128)], [too_long, one(60, 128)]) == (0, 0, 1)  # it does not fit, in neither
    assert ends([quiet, silent]) == (0, 0, 1)  # behind an address: one reply without it, one that is missing
    assert ends([quiet, told], [quiet, quiet]) == (1, 1, 1)
    assert ends([told], [told]) == (0, 0, 0)
    assert ends([one(None, 1, True)]) == (1, 1, 1)


def test_cases_without_an_answer_bound_the_share():
    cases = [Case(name=f"c{n}", prompt="x", contains=["hola"]) for n in range(20)]

    def ends(replies: list[str | None]) -> tuple:
        found = guards({"checks": replies}, None, cases)["checks"]
        return found.low, found.value, found.high

    assert ends(["hola"] * 20) == (1, 1, 1)
    assert ends(["hola", *[None] * 19]) == (0.05, 1, 1)
    assert ends(["no", *["hola"] * 9, *[None] * 10]) == (0.45, 0.9, 0.95)
    assert ends([None] * 20) == (0, None, 1)
    judged = [Case(name="j", prompt="x", judge="saluda"), cases[0]]  # nobody judges: left out, as documented
    assert guards({"checks": ["hola", "hola"]}, None, judged)["checks"] == Interval(1, 1, 1)


def test_overfitting_is_the_gap_between_unseen_and_seen():
    loss = Interval(3.0, 2.5, 3.5)
    assert overfitting(loss, {"train_loss": 0.5, "objective": ["sft"]}) == Interval(2.5, 2.0, 3.0)
    assert overfitting(loss, {"train_loss": 0.5, "objective": ["sft", "dpo"]}).value is None  # a loss of another kind
    assert overfitting(loss, {"train_loss": 0.5}).value is None
    sound = {"train_loss": 0.5, "objective": ["sft"], "rows": {"train": 95, "dropped": 5}}
    assert overfitting(loss, sound).value == 2.5
    assert overfitting(loss, {**sound, "rows": {"train": 60, "dropped": 40}}).value is None  # the short ones are easier
    assert overfitting(Interval(None, None, None), {"train_loss": 0.5, "objective": ["tools"]}).value is None


def test_parity_counts_replies_and_renderings():
    found = guards({"same_alone": [True, True, False], "same_rendering": [True]}, None, [])
    assert found["parity"].value == 0.75
    assert found["checks"].value is None


def test_a_case_expects_calls_exactly():
    tool = {"name": "book", "parameters": {"type": "object"}}
    call = {"name": "book", "arguments": {"day": "lunes", "phone": 59171234567}}
    case = Case.model_validate({"name": "books", "prompt": "hola", "tools": tool, "calls": call})
    assert case.offered([]) == [{"type": "function", "function": tool}]
    assert Case(name="any", prompt="hola", contains=["a"]).offered([tool]) == [tool]
    assert Case(name="none", prompt="hola", contains=["a"], tools=[]).offered([tool]) == []
    said = calls_text([{"name": "book", "arguments": {"phone": "59171234567", "day": "lunes"}}])  # as the corpus writes numbers
    assert judge_case(case, said).passed
    assert judge_case(case, "Con gusto.").why.startswith("calls: nothing, not book(")
    assert not judge_case(case, calls_text([{"name": "book", "arguments": {"day": "martes"}}])).passed
    nothing = Case.model_validate({"name": "talks", "prompt": "hola", "calls": []})
    assert judge_case(nothing, "Con gusto.").passed
    assert not judge_case(nothing, said).passed
    with pytest.raises(ValidationError, match="calls pay, which its tools"):
        Case.model_validate({"name": "books", "prompt": "hola", "tools": [tool], "calls": {"name": "pay"}})
    with pytest.raises(ValidationError, match="each tool is a function"):
        Case.model_validate({"name": "books", "prompt": "hola", "tools": [{"parameters": {}}], "calls": []})


def test_another_tenants_facts():
    examples = [
        ("aurora", ["hola"], "Bienvenida a Clínica Aurora. Estamos en la calle Alcalá 212."),
        ("plaza", ["hola"], "Estamos en la avenida Vallarta 1820, cerca del metro Hidalgo."),
        ("plaza", ["conozco la Clínica Aurora"], "Con gusto, en Dental Plaza."),
    ]
    own = own_facts(examples)
    assert own[("code", "212")] == "aurora"
    assert own[("code", "1820")] == "plaza"
    assert ("name", "clinica aurora") not in own  # another tenant's users speak of it
    assert foreign("Estamos en la calle Alcalá 212.", "plaza", [], own)
    assert not foreign("Estamos en la calle Alcalá 212.", "aurora", [], own)
    assert not foreign("Sí, la 212.", "plaza", ["¿es la 212?"], own)
    assert own_facts(examples[:1]) == {}


def test_a_suite_is_read_with_its_faults_named(tmp_path: Path):
    with pytest.raises(SettingsError, match="no folder"):
        read_suite(tmp_path / "none")
    with pytest.raises(SettingsError, match="holds no case"):
        read_suite(tmp_path)
    (tmp_path / "a.yaml").write_text(
        "- {prompt: '¿Abren los domingos?', contains: domingo, not_contains: [las 9], regex: 'cerra'}\n"
        "- {name: precio, messages: [{role: user, content: hola}], json: {tool: book}}\n"
    )
    (tmp_path / "b.jsonl").write_text('{"name": "juez", "prompt": "hola", "judge": "saluda"}\n')
    cases = read_suite(tmp_path)
    assert [case.name for case in cases] == ["a 1", "precio", "juez"]
    assert cases[0].chat("Eres…")[0]["role"] == "system"
    (tmp_path / "c.yaml").write_text("- {prompt: hola, contian: x}")
    with pytest.raises(SettingsError, match=r"c\.yaml: case 1: contian"):
        read_suite(tmp_path)
    (tmp_path / "c.yaml").write_text("- {prompt: hola}")
    with pytest.raises(SettingsError, match="expect something"):
        read_suite(tmp_path)
    (tmp_path / "c.yaml").write_text("[")
    with pytest.raises(SettingsError, match="not readable"):
        read_suite(tmp_path)


def test_cases_hold_or_say_why():
    case = Case(name="c", prompt="¿Abren?", contains=["domingo", "lunes"], not_contains=["mañana"], regex=["cerra(mos|do)"])
    assert judge_case(case, "Los DOMINGOS cerramos.").passed
    wrong = judge_case(case, "Sí, mañana.")
    assert wrong.passed is False
    assert "contains: none of" in wrong.why
    assert "holds 'mañana'" in wrong.why
    tool = Case.model_validate({"name": "t", "prompt": "x", "json": {"tool": "book", "n": 2}})
    assert judge_case(tool, '{"tool": "book", "n": 2, "more": 1}').passed
    assert "n is 3, not 2" in judge_case(tool, '{"tool": "book", "n": 3}').why
    assert judge_case(tool, "no json").passed is False
    assert judge_case(Case.model_validate({"name": "t", "prompt": "x", "json": True}), "[1]").passed
    judged = Case(name="j", prompt="x", judge="saluda")
    assert judge_case(judged, "hola").passed is None
    assert judge_case(judged, "hola", True).passed
    assert judge_case(judged, "hola", False).passed is False
    assert [judge_case(judged, "hola", said).judged for said in (True, False, None)] == [True, True, False]
    both = Case(name="b", prompt="x", judge="saluda", contains=["hola"])
    found = guards({"checks": ["hola", "adiós"], "checks_judged": [False, None]}, None, [both, both])["checks"]
    assert found.value == 0  # the second fails by its words; the first is only the judge's
