"""Live messages that call tools and answer them: structured from every kind of source, or refused by name."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.corpus.cells import typed
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.mapping import SourceMapping
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.corpus.validation import validate
from finetune_assets.dataset.tool_calls import messages_of
from finetune_assets.storage import Store
from finetune_assets_tests.corpus.exports import KEY, Row, export, message, write

CALL = {"id": "call_9", "type": "function", "function": {"name": "free_hours", "arguments": '{"day":"lunes"}'}}


def talk() -> dict[str, list[Row]]:
    tables = export(1, 2)
    tables["messages"] = [
        message(0, 0, content="¿Hay hora el lunes?"),
        message(1, 0, content=None, tool_calls=json.dumps([CALL])),
        message(2, 0, role="tool", content='["10:30"]', tool_name="free_hours"),
        message(3, 0, content="Sí, a las 10:30. ¿La reservo?"),
        message(4, 0, content="Sí, mi correo es ana@example.org"),
        message(5, 0, content="Un momento", tool_calls='[{"name":"book","arguments":{"mail":"ana@example.org"}}]'),
        message(6, 0, role="Tool ", content="booked"),
        message(7, 0, content="Reservada.", tool_calls="[]"),
    ]
    tables["feedback"][0]["message_id"] = "msg_0003"
    return tables


def built(home: Path, source: SourceTables) -> pl.DataFrame:
    store = Store(home)
    weeks = stale_weeks(store, source).stale
    ingest_conversations(store, source, weeks, KEY)
    ingest_feedback(store, source, weeks, KEY)
    build_examples(store, weeks)
    assert stale_weeks(store, source).stale == []
    return pl.read_parquet(f"{home}/corpus/examples/*/part.parquet", hive_partitioning=False)


def test_calls_and_answers_are_messages_of_the_data_set(tmp_path: Path) -> None:
    examples = built(tmp_path / "home", read_source([str(write(tmp_path / "source", talk()))]))
    assert examples["message_id"].to_list() == ["msg_0001", "msg_0003", "msg_0005", "msg_0007"]
    last = examples.row(3, named=True)
    said = messages_of([(turn["role"], turn["content"]) for turn in last["context"]] + [("assistant", last["reply"])])
    assert [one["role"] for one in said] == ["user", "assistant", "tool", "assistant", "user", "assistant", "tool", "assistant"]
    assert said[1]["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": {"name": "free_hours", "arguments": '{"day":"lunes"}'}}
    ]
    assert said[2] == {"role": "tool", "tool_call_id": "call_1", "name": "free_hours", "content": '["10:30"]'}
    assert said[5]["content"] == "Un momento"
    assert json.loads(said[5]["tool_calls"][0]["function"]["arguments"]) == {"mail": "[EMAIL]"}
    assert said[6] == {"role": "tool", "tool_call_id": "call_2", "content": "booked"}
    assert said[7] == {"role": "assistant", "content": "Reservada."}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", "nested.parquet", "nested.jsonl", "sqlite"])
def test_every_kind_of_source_says_the_same(tmp_path: Path, suffix: str) -> None:
    wanted = built(tmp_path / "wanted", read_source([str(write(tmp_path / "files", talk()))]))
    tables, folder = talk(), tmp_path / "other"
    if suffix.startswith("nested"):
        for row in tables["messages"]:
            row["tool_calls"] = json.loads(row["tool_calls"]) if row.get("tool_calls") else None
        write(folder, tables | {"messages": []}, ".jsonl")
        (folder / "messages.jsonl").unlink()
        if suffix.endswith("jsonl"):
            lines = (json.dumps(row, default=str) for row in tables["messages"])
            (folder / "messages.jsonl").write_text("\n".join(lines))
        else:
            names = ("message_id", "conversation_id", "role", "content", "intent", "created_at", "tool_name", "tool_calls")
            columns = {name: [row.get(name) for row in tables["messages"]] for name in names}
            pl.DataFrame(columns, strict=False).write_parquet(folder / "messages.parquet")
        source = str(folder)
    elif suffix == "sqlite":
        path = tmp_path / "platform.db"
        with sqlite3.connect(path) as connection:
            for table, rows in tables.items():
                names = sorted({name for row in rows for name in row})
                connection.execute(f"CREATE TABLE {table} ({', '.join(names)})")
                values = [[json.loads(json.dumps(row.get(name), default=str)) for name in names] for row in rows]
                connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(names))})", values)
        connection.close()
        source = f"sqlite:///{path}"
    else:
        source = str(write(folder, tables, suffix))
    assert built(tmp_path / "home", read_source([source])).equals(wanted)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tool_calls": "no json"}, "tool_call_invalid"),
        ({"tool_calls": '[{"name":"a","arguments":"{"}]'}, "tool_call_invalid"),
        ({"tool_calls": '[{"arguments":{}}]'}, "tool_call_invalid"),
        ({"tool_calls": "[" * 100_000}, "tool_call_invalid"),
        ({"tool_calls": '[{"name":"a","arguments":{"x":"\\u0000"}}]'}, "tool_call_invalid"),
        ({"tool_calls": '[{"name":"a","arguments":{"x":"\\ud800"}}]'}, "text_broken"),
        ({"role": "tool", "content": None}, "content_null"),
        ({"role": "tool", "content": " "}, "content_empty"),
        ({"role": "tool", "content": "a\x00b"}, "text_broken"),
        ({"role": "system"}, "role_unknown"),
    ],
)
def test_what_makes_no_sense_is_set_aside_by_name(tmp_path: Path, given: Row, reason: str) -> None:
    tables = export(1, 4)
    tables["messages"][3] |= given
    rejected = validate(read_source([str(write(tmp_path, tables, ".jsonl"))])).rejected
    assert rejected.select("id", "reason").rows() == [("msg_0003", reason)]


def test_the_columns_can_be_mapped(tmp_path: Path) -> None:
    tables = talk()
    for row in tables["messages"]:
        row["calls"], row["function"] = row.pop("tool_calls", None), row.pop("tool_name", None)
        row["role"] = {"tool": "function_result"}.get(row["role"], row["role"])
    mapping = SourceMapping.model_validate(
        {
            "tables": {
                "messages": {
                    "columns": {"tool_calls": "calls", "tool_name": "function"},
                    "values": {"role": {"function_result": "tool"}},
                }
            }
        }
    )
    found = read_source([str(write(tmp_path / "mapped", tables))], mapping)
    assert found.unknown_columns["messages"] == []
    assert found.messages.equals(read_source([str(write(tmp_path / "plain", talk()))]).messages)


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "arguments", "function", "x"]), inner),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    anything,
    st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
    st.sampled_from(["assistant", "tool", "user"]),
)
def test_any_value_is_taken_or_named(value: Any, content: str | None, role: str) -> None:
    calls = json.dumps(value)
    raw = pl.DataFrame({"message_id": ["m"], "role": [role], "content": [content], "tool_calls": [calls], "tool_name": ["t"]})
    row = typed(raw.with_columns(pl.col("content").cast(pl.String)), "messages").row(0, named=True)
    assert row["role"] == ("user" if role == "tool" else role)
    if role == "user":
        assert (row["content"], row["problem"]) == (content, None)
    if role == "assistant" and row["content"] != content:
        assert messages_of([("user", "a"), ("assistant", row["content"])])[-1].get("tool_calls") or "\ufffd" in row["content"]
