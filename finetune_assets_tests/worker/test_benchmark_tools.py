"""Tool-calling assistants: prompts offer the tools, the likelihood is that of real calls, replies are compared call by call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets.assistants.settings import Assistant
from finetune_assets.corpus.forms import calls_text
from finetune_assets.evaluation import benchmark, candidates, report
from finetune_assets.storage import read_json
from finetune_assets.worker import guards, models
from finetune_assets.worker.generate import Generator
from finetune_assets_tests.evaluation.frozen import benchmarked, make_dataset
from finetune_assets_tests.loopback import Handler, served
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model

TOOL = {"type": "function", "function": {"name": "book", "parameters": {"type": "object", "properties": {"day": {}}}}}
OFFERED: list[Any] = []
SUITE = """
- {name: books, prompt: "Quiero una cita el martes, por favor", calls: {name: book, arguments: {day: martes}}}
- {name: another day, prompt: "Quiero una cita el martes, por favor", calls: {name: book, arguments: {day: jueves}}}
- {name: only talks, prompt: "Quiero una cita el lunes, por favor", calls: []}
- {name: is offered none, prompt: "Quiero una cita el martes, por favor", tools: [], contains: claro}
"""


def booking(n: int, day: str) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "book", "arguments": json.dumps({"day": day})}}
    return [
        {"role": "system", "content": "Reserva citas."},
        {"role": "user", "content": f"Quiero una cita el {day}, número {n}."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]


class Provider(Handler):
    """Books every day but Monday, on which it only talks; one call is no JSON."""

    def answer(self, body: dict[str, Any]) -> None:
        OFFERED.append(body.get("tools"))
        text = body["messages"][-1]["content"]
        day = text.split(" el ")[1].split(",")[0] if " el " in text else ""
        arguments = "{broken" if "número 5" in text else json.dumps({"day": day})
        call = {"id": "x", "type": "function", "function": {"name": "book", "arguments": arguments}}
        talks = day == "lunes" or not body.get("tools")
        message: dict[str, Any] = {"content": "Claro." if talks else None, **({} if talks else {"tool_calls": [call]})}
        answer = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}).encode()
        self.say(200, answer)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(Provider) as address:
        yield address


@pytest.fixture(scope="module")
def made(url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tools")
    days = ["lunes", "martes", "jueves", "viernes"]
    after = {"role": "tool", "tool_call_id": "call_1", "name": "book", "content": "libre a las 17:00"}
    talk = [*booking(9, "martes"), after, {"role": "assistant", "content": "Listo, a las 17:00."}]
    chats = {
        "train": [booking(n, days[n % 4]) for n in range(12)],
        "validation": dialogues(2, seed=3),
        "test": [*(booking(n, days[n % 4]) for n in range(8)), talk, talk],
    }
    dataset = make_dataset(folder / "data", rows=chats)
    for split in chats:
        lines = [json.loads(line) for line in (dataset / f"{split}.jsonl").read_text().splitlines()]
        (dataset / f"{split}.jsonl").write_text("".join(json.dumps({**line, "tools": [TOOL]}) + "\n" for line in lines))
    (folder / "suite").mkdir()
    (folder / "suite" / "cases.yaml").write_text(SUITE)
    bench = {"max_rows": 10, "max_new_tokens": 8, "endpoints": [{"name": "gpt", "url": url, "model": "m"}]}
    bench["checks"] = str(folder / "suite")
    assistant = Assistant(name="dental", select={"vertical": "dental"}, tools=[TOOL], benchmark=bench)
    models_ = [str(make_tiny_model(folder / name, context=256, seed=seed)) for name, seed in (("base", 0), ("tuned", 1))]
    asked = candidates.standard(dataset, *models_, assistant.benchmark)
    benchmarked(assistant, dataset, asked, folder / "out")
    return folder, benchmark.summarise(assistant, folder / "out", benchmark.Made("v1", dataset))


def test_calls_are_exact_or_not(made: tuple[Path, dict[str, Any]]):
    folder, found = made
    gpt = pl.read_parquet(folder / "out" / "gpt.parquet")
    assert calls_text([{"name": "book", "arguments": {"day": "martes"}}]) in gpt["reply"].to_list()
    assert gpt["missing"].drop_nulls().to_list() == ["not an answer: JSONDecodeError"]  # a call that is no JSON is no answer
    assert all(tools == [TOOL] for tools in OFFERED if tools)
    assert len([tools for tools in OFFERED if tools]) == 13  # ten rows, three cases
    exact = found["candidates"]["gpt"]["tool_calls"]["value"]
    assert exact == pytest.approx(5 / 9)  # eight bookings: one missing, two on Mondays; of the two that talk it calls in one
    assert found["candidates"]["tuned"]["tool_calls"]["value"] == 0
    assert "Llamadas a herramientas exactas" in report.html(found)


def test_prompts_offer_the_tools_and_references_are_calls(made: tuple[Path, dict[str, Any]]):
    folder, _ = made
    rows = [json.loads(line) for line in (folder / "out" / "prompts" / "base.jsonl").read_text().splitlines()]
    assert all(row["tools"] == [TOOL] for row in rows)
    generator = Generator(str(folder / "base"), 8)
    row = next(row for row in rows if row.get("calls"))
    ids, _ = models.encode_prompt(generator.tokenizer, row["messages"], 248, row["tools"])
    assert '"name": "book"' in generator.tokenizer.decode(ids)
    whole, mask, _ = models.encode_example(generator.tokenizer, guards.chat_of(row), 256, row["tools"])
    target = generator.tokenizer.decode([token for token, wanted in zip(whole, mask, strict=True) if wanted])
    assert target.startswith("<tool_call>")  # as it was trained, not the corpus' text of it
    frame = pl.read_parquet(folder / "out" / "base.parquet")
    assert frame["prompt_tokens"].min() > 60
    assert frame["nll"].null_count() == 0
    told = read_json(folder / "out" / "result.json")["candidates"]["base"]
    assert told["same_rendering"] == []  # the template knows no tools
    assert all(told["same_alone"])


def test_cases_of_the_suite_offer_tools_and_expect_calls(made: tuple[Path, dict[str, Any]]):
    folder, found = made
    cases = [json.loads(line) for line in (folder / "out" / "checks.jsonl").read_text().splitlines()]
    assert [case.get("tools") for case in cases] == [[TOOL]] * 3 + [None]
    assert found["candidates"]["gpt"]["checks"]["value"] == 0.75  # the other day is not what was asked for
    told = {one["case"]: one["why"] for one in found["checks"]}  # of the tuned model, whose random weights call nothing
    assert told["books"] == 'calls: nothing, not book({"day": "martes"})'
    assert told["only talks"] == ""
