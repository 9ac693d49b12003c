"""A judge that looks at replies wins its case; one that only looks at places says nothing, and is seen to."""

import pytest

from finetune_assets.evaluation.candidates import TestRow as Row
from finetune_assets.evaluation.human.statistics import agreement
from finetune_assets.evaluation.judge import holds, judged, questions, verdict

ROWS = [Row([{"role": "user", "content": "hola"}], "r", f"c{n}", f"m{n}", "t", "other") for n in range(60)]
GOOD, BAD = [f"bien {n}" for n in range(60)], [f"mal {n}" for n in range(60)]


def answers(asked: list[dict], choose) -> list[tuple[str | None, str | None]]:
    return [tuple(choose(question[way][-1]["content"]) for way in ("forth", "back")) for question in asked]


def test_a_judge_that_reads():
    asked = questions(ROWS, GOOD, BAD, 50)
    assert len(asked) == 50
    found = judged(ROWS, asked, answers(asked, lambda text: "A" if "Reply A:\nbien" in text else "B."))
    assert found["win_rate"]["value"] == 1
    assert found["first_place"]["value"] == 0.5
    assert found["consistent"] == 50
    people = {"m1": "first", "m2": "second", "m99": "first"}
    told = agreement(found["choices"], people)
    assert (told["agreement"], told["agreement_rows"]) == (0.5, 2)
    assert told["agreement_low"] < 0.1
    assert told["agreement_high"] > 0.9
    assert told["agreement_alpha"] is not None
    assert agreement(found["choices"], {}) == dict.fromkeys(told) | {"agreement_rows": 0}


def test_a_judge_that_likes_the_first_place():
    asked = questions(ROWS, GOOD, BAD, 50)
    found = judged(ROWS, asked, answers(asked, lambda _text: "A"))
    assert found["win_rate"]["value"] == 0.5
    assert found["first_place"]["value"] == 1
    assert found["consistent"] == 0


def test_what_is_missing_is_counted():
    asked = questions(ROWS, ["igual", None, *GOOD[2:]], ["igual", "x", *BAD[2:]], 3)
    assert [question["row"] for question in asked] == [2, 3, 4]
    found = judged(ROWS, asked, [("A", None), ("who knows", "B"), ("A", "B")])
    assert (found["missing"], found["win_rate"]["value"]) == (2, 1)
    assert judged(ROWS, [], [])["win_rate"]["value"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("A", "A"), (" b. ", "B"), ("**T**", "T"), ("Answer: B", "B"), ("", None), (None, None), ("Both", None)),
        *(("It's a tie.", "T"), ("A tie", "T"), ("Tie", "T"), ("A, though it is nearly a tie", "A"), ("B is a bit better", "B")),
    ],
)
def test_verdicts(text: str | None, expected: str | None):
    assert verdict(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Y", True), ("Yes.", True), ("**N**", False), ("No", False), ("Sí", True), ("si", True), ("", None), ("maybe", None)],
)
def test_whether_a_case_holds(text: str, expected: bool | None):
    assert holds(text) is expected
