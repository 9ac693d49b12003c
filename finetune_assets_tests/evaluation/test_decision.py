"""The recommendation follows the numbers, also when they are turned round; a cost without its price is null, never zero."""

import datetime
from functools import partial

import pytest

from finetune_assets.assistants.settings.evaluation import EndpointSettings
from finetune_assets.evaluation.decision import Money, break_even, decide, order, usd_per_request
from finetune_assets.evaluation.measures import MEASURES
from finetune_assets.evaluation.statistics import NOTHING, Interval

MONEY = Money(2.0, 10_000, "corpus")


def decided(
    bits: dict[str, float],
    noise: float = 0.02,
    verdict: str | None = "serve",
    usd: dict[str, float] | None = None,
    count: int = 60,
    knowing: dict[str, float] | None = None,
) -> dict:
    """Candidates with these bits per byte, whose differences have intervals of `noise` either way."""

    def value(name: str) -> dict[str, Interval]:
        cost = (usd or {}).get(name)
        known = {"bits_per_byte": Interval(bits[name], 0, 9), "usd_per_1000": Interval(cost, cost, cost)}
        return {measure: known.get(measure, NOTHING) for measure in MEASURES}

    def compare(first: str, second: str, measure: str, bits: dict[str, float] = bits) -> Interval:
        if measure != "bits_per_byte":
            return NOTHING
        gap = bits[first] - bits[second]
        return Interval(gap, gap - noise, gap + noise, count)

    def judge(_option: str) -> dict | None:
        return {"verdict": verdict, "reasons": []} if verdict else None

    knowledge = partial(compare, bits=knowing) if knowing else None
    return decide({name: value(name) for name in bits}, compare, "bits_per_byte", judge, MONEY, knowledge)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ({"base": 2.0, "few_shot": 1.99, "rag": 2.01, "tuned": 0.8, "tuned_rag": 0.81}, "tuned"),
        ({"base": 2.0, "few_shot": 1.99, "rag": 2.01, "tuned": 0.8, "tuned_rag": 0.6}, "tuned_rag"),
        ({"base": 2.0, "few_shot": 1.5, "rag": 1.0, "tuned": 1.2, "tuned_rag": 1.01}, "rag"),
        ({"base": 2.0, "few_shot": 1.5, "rag": 1.49, "tuned": 1.5, "tuned_rag": 1.6}, "few_shot"),
        ({"base": 0.8, "few_shot": 1.5, "rag": 1.0, "tuned": 2.0, "tuned_rag": 2.0}, "base"),
        ({"base": 2.0, "few_shot": 2.0, "tuned": 1.0}, "tuned"),
    ],
)
def test_the_recommendation_follows_the_numbers(bits: dict[str, float], expected: str):
    assert decided(bits)["recommendation"] == expected


def test_a_sure_but_tiny_gain_is_not_worth_the_trouble():
    found = decided({"base": 2.0, "few_shot": 1.995, "tuned": 1.99}, noise=0.0001)
    assert found["recommendation"] == "base"
    assert [step["better"] for step in found["steps"]] == [False, False]
    assert found["prompting_helps"] is False


@pytest.mark.parametrize(("few_shot", "noise", "helps"), [(1.5, 0.01, True), (2.1, 0.01, False), (1.9, 0.5, None)])
def test_whether_the_prompt_helps_may_be_open(few_shot: float, noise: float, helps: bool | None):
    assert decided({"base": 2.0, "few_shot": few_shot, "tuned": 1.0}, noise=noise)["prompting_helps"] is helps


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_few_conversations_decide_nothing(count: int):
    bits = {"base": 2.0, "few_shot": 1.5, "rag": 1.4, "tuned": 0.5, "tuned_rag": 0.4}
    found = decided(bits, count=count)
    assert (found["recommendation"], found["settled"], found["prompting_helps"]) == ("base", False, None)
    assert {step["better"] for step in found["steps"]} == {None}
    assert set(found["retrieval_helps"].values()) == {None}
    assert decided(bits)["settled"]


def test_a_recommended_model_that_misses_its_gates_is_not_ready():
    bits = {"base": 2.0, "few_shot": 2.0, "tuned": 1.0}
    assert decided(bits)["ready"]
    assert not decided(bits, verdict="do_not_serve")["ready"]
    base = {"base": 1.0, "few_shot": 2.0, "tuned": 2.0}
    assert decided(base, verdict="do_not_serve")["ready"] is False  # not even the base, by its own gates
    assert decided(base, verdict=None)["ready"] is None


def test_retrieval_is_judged_where_knowledge_is_needed():
    bits = {"base": 2.0, "rag": 2.0, "tuned": 1.0, "tuned_rag": 1.0}
    assert decided(bits, noise=0.005)["retrieval_helps"] == {"rag": False, "tuned_rag": False}
    found = decided(bits, noise=0.005, knowing={**bits, "tuned_rag": 0.5})
    assert found["retrieval_helps"] == {"rag": False, "tuned_rag": True}
    assert found["recommendation"] == "tuned"


def test_money():
    found = decided({"base": 2.0, "champion": 1.1, "tuned": 1.0, "gpt": 1.0}, usd={"tuned": 0.5, "champion": 0.5, "gpt": 2.5})
    assert found["monthly"] == {"base": None, "champion": 5.0, "tuned": 5.0, "gpt": 25.0}
    assert found["break_even"] == {"champion": None, "gpt": 1000}
    assert break_even(None, 2.0, 1.0) is None
    assert break_even(1.0, 1.0, 2.0) is None
    priced = EndpointSettings(
        name="gpt",
        url="https://example.org/v1",
        model="m",
        usd_per_million_input=0.4,
        usd_per_million_output=1.6,
        priced_on=datetime.date(2026, 11, 1),
    )
    assert usd_per_request(priced, 1000, 100) == pytest.approx(0.00056)
    assert usd_per_request(priced.model_copy(update={"usd_per_million_output": None}), 1000, 100) is None


def test_endpoints_come_last():
    assert order(["gpt", "tuned", "base"]) == ["base", "tuned", "gpt"]
