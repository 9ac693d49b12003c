"""Every objective and adapter on tiny models: what is learnt, what is written, and that others read the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_assets.errors import ModelUnavailable
from finetune_assets.storage import read_json
from finetune_assets.training.encoding import LightRenderer, encode_example
from finetune_assets.worker import models
from finetune_assets.worker.__main__ import run_task
from finetune_assets.worker.generate import Generator
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model
from finetune_assets_tests.training_jobs import make_spec, preferences, thumbs, write_lines, write_rows

TOOL = {
    "type": "function",
    "function": {
        "name": "reservar",
        "description": "Reserva una cita.",
        "parameters": {"type": "object", "properties": {"dia": {"type": "string"}}},
    },
}


def tool_chat(day: str) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "reservar", "arguments": json.dumps({"dia": day})}}
    chat = [
        {"role": "user", "content": f"Quiero una cita el {day}."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    return {"messages": chat, "tools": [TOOL]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", dialogues(64, seed=3))
    write_rows(folder / "validation.jsonl", dialogues(16, seed=5))
    write_lines(folder / "preferences.jsonl", preferences(64, seed=6))
    write_lines(folder / "preferences_heldout.jsonl", preferences(24, seed=7))
    write_lines(folder / "kto.jsonl", thumbs(64, seed=8))
    write_lines(folder / "kto_heldout.jsonl", thumbs(24, seed=9))
    (folder / "text").mkdir()
    for number in range(6):
        text = " ".join(message["content"] for chat in dialogues(12, seed=20 + number) for message in chat)
        (folder / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def test_a_chain_ends_in_a_model_that_prefers_what_people_preferred(tmp_path: Path, base: Path, data: Path):
    spec = make_spec(
        tmp_path / "job",
        base,
        data,
        objective=["continued_pretraining", "sft", "dpo"],
        text=str(data / "text"),
        cache=str(tmp_path / "cache"),
        hyperparameters={
            "max_length": 128,
            "learning_rate": 5e-3,
            "by_objective": {"dpo": {"learning_rate": 5e-3, "epochs": 2}},
        },
    )
    assert run_task(spec) == 0
    result = read_json(tmp_path / "job" / "result.json")
    assert result["objective"] == ["continued_pretraining", "sft", "dpo"]
    text, sft, dpo = result["stages"]
    assert text["train_loss"] < 6.2  # ln 512 at the start
    assert sft["eval_losses"][-1] < sft["eval_losses"][0] < text["train_loss"]
    assert result["eval_loss"] == sft["eval_loss"]
    held = dpo["heldout"]
    assert (held["rows"], held["good"], held["bad"]) == (24, 24, 24)
    assert held["reward_accuracy"]["low"] > 0.8
    assert held["reward_margin"]["low"] > 0
    assert held["good_nats_per_token"]["after"] < held["good_nats_per_token"]["before"]
    assert not held["likelihood_fell"]
    log = [json.loads(line) for line in (tmp_path / "job" / "training_log.jsonl").read_text().splitlines()]
    assert [point["step"] for point in log] == sorted(point["step"] for point in log)
    assert {point["stage"] for point in log} == {"continued_pretraining", "sft", "dpo"}
    assert result["tokens"] == sum(stage["tokens"] for stage in result["stages"])
    assert len(list((tmp_path / "cache").iterdir())) == 5  # text, two of chat, two of preferences
    assert not (tmp_path / "job" / "stages").exists()


def test_an_adapter_is_kept_alone_and_merged_and_both_answer_alike(tmp_path: Path, base: Path, data: Path):
    values = {"max_length": 128, "learning_rate": 1e-2, "by_objective": {"kto": {"learning_rate": 1e-2, "epochs": 2}}}
    spec = make_spec(tmp_path / "job", base, data, objective=["sft", "kto"], adapter="lora", hyperparameters=values)
    assert run_task(spec) == 0
    result = read_json(tmp_path / "job" / "result.json")
    sft, kto = result["stages"]
    assert sft["eval_losses"][-1] < sft["eval_losses"][0]
    assert kto["heldout"]["reward_accuracy"]["low"] > 0.5
    assert (kto["heldout"]["good"], kto["heldout"]["bad"]) == (12, 12)
    model = tmp_path / "job" / "model"
    layers = read_json(model / "adapter" / "adapter_config.json")["target_modules"]
    assert layers == sorted(layers)  # the same in every process: a version's address covers this file
    ids = torch.tensor([models.encode_prompt(models.load_tokenizer(model), dialogues(1, seed=30)[0][:-1], 128)[0]])
    merged = models.load_model(model)(ids).logits
    beside = models.attach(models.load_model(base), model / "adapter")(ids).logits
    from_folder = models.load_model(model / "adapter")(ids).logits
    torch.testing.assert_close(merged, beside, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(from_folder, beside, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged, models.load_model(base)(ids).logits, atol=1e-2)
    prompts = [models.encode_prompt(models.load_tokenizer(model), chat[:-1], 128)[0] for chat in dialogues(3, seed=31)]
    replies = [reply.text for reply in Generator(str(model), 24).replies(prompts)]
    assert [reply.text for reply in Generator(str(model / "adapter"), 24).replies(prompts)] == replies
    assert Generator(str(model), 24).beside(prompts) == Generator(str(model / "adapter"), 24).beside(prompts) == replies
    assert Generator(str(base), 24).beside(prompts) is None
    reference = AutoModelForCausalLM.from_pretrained(model)  # what any other server does
    torch.testing.assert_close(reference(ids).logits, merged)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: Path, data: Path):
    spec = make_spec(tmp_path / "job", base, data, adapter="lora", hyperparameters={"epochs": 1, "max_length": 128})
    write_rows(tmp_path / "few" / "train.jsonl", dialogues(8))
    assert run_task({**spec, "dataset": str(tmp_path / "few")}) == 0
    adapter = tmp_path / "job" / "model" / "adapter"
    other = make_tiny_model(tmp_path / "other", hidden=48, heads=2)
    config = read_json(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))
    with pytest.raises(ModelUnavailable, match=r"does not belong to its base model \(size mismatch"):
        models.load_model(adapter)


def test_tools_are_learnt_by_a_model_whose_template_does_not_know_them(tmp_path: Path, base: Path):
    write_lines(tmp_path / "data" / "train.jsonl", [tool_chat("jueves")] * 32)
    values = {"epochs": 8, "learning_rate": 1e-2}
    spec = make_spec(tmp_path / "job", base, tmp_path / "data", objective=["tools"], hyperparameters=values)
    assert run_task(spec) == 0
    model = tmp_path / "job" / "model"
    tokenizer = models.load_tokenizer(model)
    ids, _ = models.encode_prompt(tokenizer, tool_chat("jueves")["messages"][:1], 300, [TOOL])
    assert '"name": "reservar"' in tokenizer.decode(ids)  # as text, in the system message
    trained, mask, _ = models.encode_example(tokenizer, tool_chat("jueves")["messages"], 300, [TOOL])
    assert trained[: len(ids)] == ids
    called = tokenizer.decode(trained[mask.index(1) :])
    assert called == '<tool_call>\n{"name": "reservar", "arguments": {"dia": "jueves"}}\n</tool_call><|im_end|>'
    assert read_json(tmp_path / "job" / "result.json")["train_loss"] < 3  # 6.2 before
    assert Generator(str(model), 4).replies([ids])[0].text.startswith("<tool")


def test_a_template_that_knows_tools_renders_them(tmp_path: Path):
    folder = make_tiny_model(tmp_path)
    tokenizer = models.load_tokenizer(folder)
    tokenizer.chat_template = (
        "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}[{{ call.function.name }}: {{ call.function.arguments }}]{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    row = tool_chat("lunes")
    ids, mask, _ = encode_example(LightRenderer(folder), row["messages"], 512, row["tools"])
    assert (ids, mask) == models.encode_example(models.load_tokenizer(folder), row["messages"], 512, row["tools"])[:2]
    assert tokenizer.decode(ids[mask.index(1) :]) == '[reservar: {"dia": "lunes"}]<|im_end|>'
    assert '"name": "reservar"' in tokenizer.decode(ids[: mask.index(1)])


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2"])
def test_any_causal_model_learns_to_answer_and_to_stop(tmp_path: Path, architecture: str):
    plain = architecture == "gpt2"
    base = make_tiny_model(tmp_path / "base", architecture=architecture, template=not plain, context=128)
    same = [*dialogues(1, seed=1)[0][:-1], {"role": "assistant", "content": "Con gusto."}]
    write_rows(tmp_path / "data" / "train.jsonl", [same] * 48)
    write_rows(tmp_path / "data" / "validation.jsonl", [same] * 4)
    spec = make_spec(tmp_path / "job", base, tmp_path / "data", hyperparameters={"epochs": 5, "learning_rate": 1e-2})
    assert run_task(spec) == 0
    result = read_json(tmp_path / "job" / "result.json")
    assert result["eval_losses"][-1] < result["eval_losses"][0]
    generator = Generator(str(tmp_path / "job" / "model"), 24)
    prompt, _ = models.encode_prompt(generator.tokenizer, same[:-1], 100)
    reply = generator.replies([prompt])[0]
    assert (reply.text, reply.stopped) == ("Con gusto.", True)


@pytest.mark.parametrize("template", [True, False])
def test_training_benchmark_and_others_render_alike(tmp_path: Path, data: Path, template: bool):
    """The ids that are trained, asked in the benchmark, planned, and rendered by any server from the saved template agree."""
    base = make_tiny_model(tmp_path / "base", architecture="qwen2" if template else "gpt2", template=template)
    write_rows(tmp_path / "data" / "train.jsonl", dialogues(8))
    assert run_task(make_spec(tmp_path / "job", base, tmp_path / "data", hyperparameters={"epochs": 1})) == 0
    model = tmp_path / "job" / "model"
    ours, anyone = models.load_tokenizer(model), AutoTokenizer.from_pretrained(model)
    for chat in dialogues(5, seed=40, turns=3):
        ids, mask, _ = models.encode_example(models.load_tokenizer(base), chat, 512)
        prompt = models.encode_prompt(ours, chat[:-1], 512)[0]
        assert ids[: mask.count(0)] == prompt
        assert anyone.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False) == prompt
        assert LightRenderer(model).encode(LightRenderer(model).render(chat[:-1], True)) == prompt
        assert anyone.apply_chat_template(chat, return_dict=False)[: len(ids)] == ids
