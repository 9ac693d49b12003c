"""Files of providers: tool calls and rows of several targets, by each provider's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.errors import DataError
from finetune_assets.training import provider_formats

CALL = {"id": "call_1", "type": "function", "function": {"name": "libre", "arguments": '{"dia": "lunes"}'}}
TOOLS = [{"type": "function", "function": {"name": "libre", "parameters": {"type": "object", "properties": {}}}}]


def tool_rows(folder: Path, *messages: dict[str, Any], **more: Any) -> Path:
    row = {"messages": [{"role": "user", "content": "¿Hay sitio el lunes?"}, *messages], "tools": TOOLS, **more}
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(10)))
    return path


CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "libre", "content": "sí"}
SAID = {"role": "assistant", "content": "Sí, hay sitio."}


def test_tool_calls_are_carried_and_only_the_last_reply_is_learnt(tmp_path: Path) -> None:
    provider_formats.write(tool_rows(tmp_path, CALLED, RESULT, SAID), tmp_path / "out.jsonl", "weighted")
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert row["tools"] == TOOLS
    assert [message.get("weight") for message in row["messages"]] == [None, 0, None, None]
    assert row["messages"][1]["tool_calls"] == [CALL]
    provider_formats.write(tool_rows(tmp_path, CALLED), tmp_path / "out.jsonl", "weighted")  # the call itself is the reply


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([RESULT, SAID], "answers no call"),
        ([CALLED, SAID], "comes before the result"),
        ([{**CALLED, "tool_calls": [{**CALL, "function": {"name": "a b", "arguments": "{}"}}]}, RESULT, SAID], "a name that"),
        ([{**CALLED, "tool_calls": [{**CALL, "function": {"name": "a", "arguments": "dia"}}]}, RESULT, SAID], "no JSON object"),
    ],
)
def test_broken_tool_calls_are_refused(tmp_path: Path, messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        provider_formats.write(tool_rows(tmp_path, *messages), tmp_path / "out.jsonl", "weighted")


@pytest.mark.parametrize("shape", ["bedrock_conversation", "bedrock_prompt"])
def test_bedrock_has_no_place_for_tools(tmp_path: Path, shape: provider_formats.Shape) -> None:
    with pytest.raises(DataError, match="no place"):
        provider_formats.write(tool_rows(tmp_path, CALLED, RESULT, SAID), tmp_path / "out.jsonl", shape)


def test_rows_of_several_targets(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    turns = [
        {"role": "user", "content": "Hola"},
        {**SAID, "weight": 1},
        {"role": "user", "content": "¿Y?"},
        {**SAID, "weight": 1},
    ]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(10)))
    assert provider_formats.write(path, tmp_path / "openai.jsonl", "weighted").rows == 10
    row = json.loads((tmp_path / "openai.jsonl").read_text().splitlines()[0])
    assert [message.get("weight") for message in row["messages"]] == [None, 1, None, 1]  # both are learnt
    assert provider_formats.write(path, tmp_path / "nebius.jsonl", "messages").rows == 20
    lines = [json.loads(line)["messages"] for line in (tmp_path / "nebius.jsonl").read_text().splitlines()[:2]]
    assert [len(line) for line in lines] == [2, 4]
    assert not any("weight" in message for line in lines for message in line)
