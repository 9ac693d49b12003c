"""Tool calls in what a model wrote: one call has many writings, and exactness looks at what is called, not how."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_assets.corpus.forms import calls_text
from finetune_assets.evaluation.called import as_said, calls, exact

BOOK = {"name": "book", "arguments": {"day": "lunes", "people": 2}}
ASK = {"name": "prices", "arguments": {}}
CALL = json.dumps(BOOK)


@pytest.mark.parametrize(
    ("written", "content", "called"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", [BOOK]),
        (f"Un momento.\n<tool_call>{CALL}</tool_call>\n<tool_call>{json.dumps(ASK)}", "Un momento.", [BOOK, ASK]),
        (f"Un momento. {CALL}", "Un momento.", [BOOK]),
        (f"{CALL}{json.dumps(ASK)}", "", [BOOK, ASK]),
        (f"[{CALL}, {json.dumps(ASK)}]", "", [BOOK, ASK]),
        (json.dumps({"name": "book", "parameters": BOOK["arguments"]}), "", [BOOK]),
        (json.dumps({"name": "book", "arguments": json.dumps(BOOK["arguments"])}), "", [BOOK]),
        (json.dumps({"type": "function", "function": BOOK}), "", [BOOK]),
        (calls_text([BOOK], "Voy."), "Voy.", [BOOK]),
    ],
)
def test_one_call_has_many_writings(written: str, content: str, called: list[dict]):
    assert as_said(written) == calls_text(called, content)
    assert calls(as_said(written)) == called


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hola",
        '{"day": "lunes"}',
        '{"name": "book"}',
        f"{CALL} y listo",
        "<tool_call>book</tool_call>",
        "[" * 5000,
        '[{"name": 1}]',
    ],
)
def test_anything_else_stays_as_it_is(text: str):
    assert as_said(text) == text
    assert calls(text) == []


def test_exactness_is_of_names_and_arguments_in_any_order():
    both = calls_text([BOOK, ASK])
    assert exact(calls_text([ASK, BOOK], "Voy."), both) is True
    assert exact(calls_text([BOOK]), both) is False
    assert exact(calls_text([BOOK, BOOK, ASK]), both) is False
    assert exact(calls_text([{**BOOK, "arguments": {"people": 2, "day": "lunes"}}]), calls_text([BOOK])) is True
    assert exact(calls_text([{**BOOK, "arguments": {"people": 3, "day": "lunes"}}]), calls_text([BOOK])) is False
    assert exact("Claro.", calls_text([BOOK])) is False
    assert exact(calls_text([BOOK]), "Claro.") is False
    assert exact("Hola", "Claro.") is None


@given(st.text(alphabet='{}[]"name:argumts, <tool_call>/\n1', max_size=120))
def test_any_text_is_read(text: str):
    said = as_said(text)
    assert said == text or calls(said)
