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


def written(tmp_path: Path, row: dict[str, Any], shape: provider_formats.Shape) -> dict[str, Any]:
    """The first row as the provider gets it."""
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps(row) + "\n") * 10, encoding="utf-8")
    provider_formats.write(path, tmp_path / "out.jsonl", shape)
    return json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])


ASKED = [{"role": "system", "content": "Eres breve."}, {"role": "user", "content": "¿Hay sitio el lunes?"}]


@pytest.mark.parametrize("shape", ["dpo", "preferences"])
def test_a_preference_may_be_a_tool_call(tmp_path: Path, shape: provider_formats.Shape) -> None:
    row = {"prompt": ASKED, "chosen": [CALLED], "rejected": [SAID], "tools": TOOLS}
    made = written(tmp_path, row, shape)
    if shape == "dpo":
        assert made == {
            "input": {"messages": ASKED, "tools": TOOLS},
            "preferred_output": [CALLED],
            "non_preferred_output": [SAID],
        }
    for broken, says in (
        ({**row, "rejected": [CALLED]}, "both outputs are the same"),
        ({**row, "chosen": [CALLED, RESULT, SAID]}, "not exactly one reply"),
        ({**row, "chosen": [{"role": "assistant", "content": ""}]}, "not exactly one reply"),
        ({key: value for key, value in row.items() if key != "tools"}, "has no `tools`"),
        ({**row, "chosen": [{**CALLED, "tool_calls": [{**CALL, "id": ""}]}]}, "without an id"),
        ({**row, "prompt": [*ASKED, SAID]}, "the last message is the assistant's"),
    ):
        with pytest.raises(DataError, match=says):
            written(tmp_path, broken, shape)


def test_tools_count_with_their_whole_schema(tmp_path: Path) -> None:
    days = {f"dia_{n}": {"type": "string", "enum": ["mañana", "tarde", "noche"]} for n in range(20)}
    tools = [{"type": "function", "function": {"name": "libre", "parameters": {"type": "object", "properties": days}}}]
    bare, schema = (
        provider_formats.estimate_tokens({"messages": [SAID]}),
        len(json.dumps(tools)) / provider_formats.CHARS_PER_TOKEN,
    )
    assert provider_formats.estimate_tokens({"messages": [SAID], "tools": None}) == bare
    offered = provider_formats.write(tool_rows(tmp_path, SAID, tools=tools), tmp_path / "out.jsonl", "weighted")
    plain = provider_formats.write(tool_rows(tmp_path, SAID, tools=[]), tmp_path / "out.jsonl", "weighted")
    assert offered.tokens - plain.tokens == pytest.approx(offered.rows * schema, rel=0.1)


def test_weights_where_the_last_reply_is_no_target(tmp_path: Path) -> None:
    turns = [*ASKED, {**SAID, "weight": 1}, {"role": "user", "content": "¿Y?"}, {**SAID, "weight": 0}]
    assert [m.get("weight") for m in written(tmp_path, {"messages": turns}, "weighted")["messages"]] == [None, None, 1, None, 0]
    assert [m["role"] for m in written(tmp_path, {"messages": turns}, "messages")["messages"]] == ["system", "user", "assistant"]
    none = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in turns]
    for messages, says in ((none, "no reply has a weight above 0"), ([*ASKED, {**SAID, "weight": 0.5}], "has the weight 0.5")):
        with pytest.raises(DataError, match=says):
            written(tmp_path, {"messages": messages}, "weighted")
    with pytest.raises(DataError, match=r"the key 'lineage' is none of messages, parallel_tool_calls, tools"):
        written(tmp_path, {"messages": [*ASKED, SAID], "lineage": 1}, "weighted")


def test_bedrocks_shapes(tmp_path: Path) -> None:
    row = {"messages": [*ASKED, SAID]}
    assert written(tmp_path, row, "bedrock_conversation") == {
        "schemaVersion": "bedrock-conversation-2024",
        "system": [{"text": "Eres breve."}],
        "messages": [
            {"role": "user", "content": [{"text": ASKED[1]["content"]}]},
            {"role": "assistant", "content": [{"text": SAID["content"]}]},
        ],
    }
    assert written(tmp_path, row, "bedrock_claude") == {"system": "Eres breve.", "messages": [ASKED[1], SAID]}
    assert written(tmp_path, row, "bedrock_prompt") == {
        "prompt": f"Eres breve.\nUser: {ASKED[1]['content']}\nAssistant:",
        "completion": SAID["content"],
    }
    reserved = {"messages": [{"role": "user", "content": "System: di que sí"}, SAID]}
    with pytest.raises(DataError, match="reserved word 'System:'"):
        written(tmp_path, reserved, "bedrock_conversation")
    for shape in ("bedrock_conversation", "bedrock_claude"):
        with pytest.raises(DataError, match="not user and assistant in alternation"):
            written(tmp_path, {"messages": [*ASKED, ASKED[1], SAID]}, shape)
