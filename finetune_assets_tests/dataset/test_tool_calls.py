"""Tool calls from an imported file to the frozen lines and the tokens that are trained, and back to the texts of the corpus."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.corpus.erasure import Erased
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.imports import Origin, import_files
from finetune_assets.corpus.ingest import ingest_conversations
from finetune_assets.corpus.sources import read_source
from finetune_assets.dataset import check_leaks, choose, freeze
from finetune_assets.dataset.formats import FILES, read_lines, read_targets
from finetune_assets.dataset.residual import personal_data_left
from finetune_assets.dataset.tool_calls import as_texts, messages_of, said
from finetune_assets.environment import ROOT
from finetune_assets.storage import Store
from finetune_assets.training.encoding import LightRenderer, encode_row
from finetune_assets_tests.dataset.small_corpus import dental, sentence

WEEK = datetime.date(2026, 10, 19)
BOOK = {
    "name": "book",
    "description": "Books a visit.",
    "parameters": {"type": "object", "properties": {"day": {"type": "string"}}},
}


def rows(count: int) -> list[dict[str, Any]]:
    """Bookings as OpenAI's fine-tuning files have them: a call, its answer, a reply."""
    made: list[dict[str, Any]] = []
    for n in range(count):
        call = {
            "id": f"x{n}",
            "type": "function",
            "function": {"name": "book", "arguments": json.dumps({"day": sentence(n, "day")})},
        }
        made.append(
            {
                "user_id": f"user {n}",
                "intent": "scheduling",
                "messages": [
                    {"role": "system", "content": "You book."},
                    {"role": "user", "content": f"Quiero una cita: {sentence(n, 'ask')}"},
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": f"x{n}", "content": f"libre, {sentence(n, 'free')}"},
                    {"role": "assistant", "content": f"Listo, {sentence(n, 'done')}."},
                ],
            }
        )
    return made


def frozen(folder: Path, count: int = 60, **given: Any) -> Path:
    file, export = folder / "rows.jsonl", folder / "source"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    import_files([file], export, Origin(tenant="clinic_a", vertical="dental", date=WEEK))
    store = Store(folder / "home")
    source = Erased().leave_out(read_source([str(export)]))
    ingest_conversations(store, source, [WEEK.isoformat()], b"key")
    build_examples(store, [WEEK.isoformat()])
    assistant = dental(system_prompt="You book.", **given)
    return store.dataset("dental", freeze(store, assistant, choose(store, assistant))["fingerprint"])


@pytest.mark.parametrize("layout", ["per_reply", "per_conversation"])
def test_imported_calls_are_frozen_as_openai_has_them(tmp_path: Path, layout: str) -> None:
    folder = frozen(tmp_path, rows=layout, tools=[BOOK])
    lines = list(read_lines(folder / "train.jsonl"))
    assert all(line["tools"] == [{"type": "function", "function": BOOK}] for line in lines)
    calling = [line["messages"] for line in lines if line["messages"][-1].get("tool_calls")]
    answered = [line["messages"] for line in lines if not line["messages"][-1].get("tool_calls")]
    assert len(calling) > 30
    assert len(answered) > 30
    (call,) = calling[0][-1]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "book"
    assert set(json.loads(call["function"]["arguments"])) == {"day"}
    assert [m["role"] for m in answered[0]] == ["system", "user", "assistant", "tool", "assistant"]
    assert answered[0][3]["tool_call_id"] == answered[0][2]["tool_calls"][0]["id"]
    assert answered[0][3]["name"] == "book"
    assert answered[0][3]["content"].startswith("libre")

    assert check_leaks(folder) == []
    assert personal_data_left(folder)[0] == []
    lineage = pl.read_parquet(folder / "lineage.parquet").filter(pl.col("split") == "train").sort("line", "turn")
    targets = read_targets(folder, FILES[0])
    assert lineage["turn"].to_list() == [len(line["messages"]) - 1 for line in lines] == targets["turn"].to_list()
    texts = dict(zip(targets["line"], targets["reply"], strict=True))
    assert {texts[n] for n, line in enumerate(lines)} == {said(line["messages"][-1]) for line in lines}


def test_calls_are_what_is_trained(tmp_path: Path) -> None:
    folder = frozen(tmp_path, tools=[BOOK])
    renderer = LightRenderer(ROOT / "data" / "base_model")
    line = next(line for line in read_lines(folder / "train.jsonl") if line["messages"][-1].get("tool_calls"))
    ((ids, mask, _),) = encode_row(renderer, line["messages"], 4096, line["tools"])
    trained = renderer._tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
    assert '"name": "book"' in trained
    assert json.loads(line["messages"][-1]["tool_calls"][0]["function"]["arguments"])["day"] in trained


def test_without_calls_a_line_is_what_it_was(tmp_path: Path) -> None:
    """The setting changes the fingerprint only where it is used."""
    assert "tools" not in json.loads((frozen(tmp_path) / "manifest.json").read_text())["settings"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).map(str.strip).filter(bool)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | TEXTS, lambda inner: st.lists(inner, max_size=2), max_leaves=4
)
CALLS = st.lists(
    st.fixed_dictionaries({"name": TEXTS, "arguments": st.dictionaries(TEXTS, VALUES, max_size=2)}), min_size=1, max_size=2
)


@settings(max_examples=80, deadline=None)
@given(calls=CALLS, content=st.none() | TEXTS, answers=st.lists(TEXTS, max_size=3), more=st.none() | TEXTS)
def test_messages_say_the_same_as_the_texts(
    calls: list[dict[str, Any]], content: str | None, answers: list[str], more: str | None
) -> None:
    call = {"tool_calls": calls, **({"content": content} if content else {})}
    results = [
        json.dumps({"tool_result": {"name": calls[n % len(calls)]["name"], "content": text}}) for n, text in enumerate(answers)
    ]
    turns = [
        ("user", "hola"),
        ("assistant", json.dumps(call)),
        ("user", "\n".join([*results, *([more] if more else [])]) or "sí"),
    ]
    made = messages_of(turns)
    assert [json.loads(c["function"]["arguments"]) for c in made[1]["tool_calls"]] == [c["arguments"] for c in calls]
    assert made[1]["content"] == (content or "")
    tools = [m for m in made if m["role"] == "tool"]
    assert len(tools) == min(len(calls), len(answers)) or len({c["name"] for c in calls}) > 1
    known = {c["id"] for c in made[1]["tool_calls"]}
    assert {m["tool_call_id"] for m in tools} <= known
    assert len({m["tool_call_id"] for m in tools}) == len(tools)
    back = as_texts({"messages": made})["messages"]
    assert {m["role"] for m in back} <= {"user", "assistant"}
    assert json.loads(back[1]["content"]) == call
    for text in answers:
        assert json.dumps(text, ensure_ascii=False)[1:-1] in back[-1]["content"]


def test_a_result_that_somebody_typed_stays_text() -> None:
    typed = json.dumps({"tool_result": {"name": "book", "content": "free"}}, separators=(",", ":"))
    assert messages_of([("user", typed)]) == [{"role": "user", "content": typed}]
    assert messages_of([("assistant", '{"tool_calls":[{"name":')]) == [
        {"role": "assistant", "content": '{"tool_calls":[{"name":'}
    ]
