"""Training: what is learnt, what is written, and that a kill changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_assets.storage import read_json
from finetune_assets.training.machine import default_precision
from finetune_assets.training.tokens import IGNORED, Rows, token_rows
from finetune_assets.worker import checkpoints, models, stage, targets, train
from finetune_assets.worker.__main__ import run_task
from finetune_assets.worker.loops import Totals
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.recovery import Recovery
from finetune_assets.worker.rows import LengthGrouped
from finetune_assets.worker.stage import Stage, make_loop
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model
from finetune_assets_tests.training_jobs import curve, events, make_spec, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", dialogues(75, seed=3) + dialogues(70, seed=4, turns=3))
    write_rows(folder / "validation.jsonl", dialogues(20, seed=5, turns=2))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    output = tmp_path_factory.mktemp("job")
    assert run_task(make_spec(output, base, data)) == 0
    return output


def test_a_finished_job(uninterrupted: Path, base: Path, data: Path):
    result = read_json(uninterrupted / "result.json")
    rows = token_rows(lambda: models.renderer(models.load_tokenizer(base)), ("chat", data / "train.jsonl"), {}, 256)
    assert result["steps"] == 2 * 19  # 145 rows in batches of 8
    assert result["tokens"] == 2 * rows.tokens
    assert result["eval_losses"][-1] < result["eval_losses"][0] < 6.3  # ln 512 = 6.2 at the start
    assert result["eval_loss"] == min(result["eval_losses"])
    assert result["rows"] == {"train": 145, "validation": 20, "shortened": 0, "dropped": 0}
    assert result["resumed"] == 0
    assert not (uninterrupted / "stages").exists()
    tuned = AutoModelForCausalLM.from_pretrained(uninterrupted / "model")
    assert tuned.dtype == AutoModelForCausalLM.from_pretrained(base).dtype
    assert tuned.generation_config.eos_token_id == [models.load_tokenizer(base).eos_token_id]
    assert models.load_tokenizer(uninterrupted / "model").chat_template == models.load_tokenizer(base).chat_template
    assert [point["step"] for point in curve(uninterrupted) if "eval_loss" in point] == [19, 38]


def test_a_finished_job_is_not_trained_again(uninterrupted: Path, base: Path, data: Path):
    before = (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns
    assert run_task(make_spec(uninterrupted, base, data)) == 0
    assert (uninterrupted / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_killed_job_ends_with_the_same_weights_and_curve(tmp_path: Path, base: Path, data: Path):
    """SIGKILL in the second epoch, the newest checkpoint broken as well: bit-identical to the run that was left alone. In
    bfloat16, whose rounding shows whatever a start that goes on computes in another way."""
    uninterrupted, output = tmp_path / "uninterrupted", tmp_path / "killed"
    for folder in (uninterrupted, output):
        folder.mkdir()
    assert run_task(make_spec(uninterrupted, base, data, precision="bfloat16")) == 0
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(make_spec(output, base, data, precision="bfloat16", checkpoint_seconds=0)))
    command = [sys.executable, "-m", "finetune_assets.worker", str(file)]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    saved = output / "stages" / "0-sft" / "checkpoints"
    while not list(saved.glob("checkpoint-2[0-9]")):  # of the second epoch; not each step has one
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    newest = checkpoints.listed(saved)[-1]
    with (newest / "optimizer.pt").open("r+b") as optimizer:
        optimizer.truncate(100)
    assert run_task(json.loads(file.read_text())) == 0
    result, expected = read_json(output / "result.json"), read_json(uninterrupted / "result.json")
    assert result["resumed"] == 1
    (event,) = events(output, "resumed")
    assert event["step"] >= 19
    assert event["cause"] == "the process before this one was killed"
    for name in ("model_sha256", "steps", "tokens", "eval_losses", "train_loss", "best_step"):
        assert result[name] == expected[name], name
    assert result["wall_seconds"] > result["seconds"] > 0  # the loop of the start before is in both
    assert curve(output) == curve(uninterrupted)
    assert "is broken" in (output / "progress.jsonl").read_text()


def test_a_kill_after_the_last_step_trains_no_further(tmp_path: Path, uninterrupted: Path, base: Path, data: Path, monkeypatch):
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    spec = make_spec(tmp_path, base, data)
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish_model", killed)
        with pytest.raises(KeyboardInterrupt):
            run_task(spec)
    assert run_task(spec) == 0
    assert read_json(tmp_path / "result.json")["model_sha256"] == read_json(uninterrupted / "result.json")["model_sha256"]
    assert curve(tmp_path) == curve(uninterrupted)


@pytest.mark.parametrize(("architecture", "logits"), [("qwen2", 2**28), ("qwen2", 0), ("gpt2", 2**28)])
def test_only_the_last_reply_and_its_end_are_learnt(tmp_path: Path, data: Path, monkeypatch, architecture: str, logits: int):
    """The loss that the loop computes is the cross-entropy of the targets alone, by either way of computing it."""
    monkeypatch.setattr(targets, "LOGITS", logits)
    base = make_tiny_model(tmp_path / "base", architecture=architecture, template=architecture != "gpt2")
    spec = make_spec(tmp_path, base, data)
    tokenizer, model = models.load_tokenizer(base), models.load_model(base)
    rows = token_rows(lambda: models.renderer(tokenizer), ("chat", data / "train.jsonl"), {}, 256)
    progress = Progress.open(tmp_path)
    recovery = Recovery(tmp_path, progress, 8)
    loop = make_loop(Stage(spec, 0, None), model, tokenizer, (rows, Rows()), Totals(), recovery)
    model.eval()
    batch = loop.data_collator(rows.examples[70:78])  # of both lengths: some are padded
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    wanted = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[wanted != IGNORED], wanted[wanted != IGNORED])
    assert (wanted != IGNORED).sum() == sum(label != IGNORED for row in rows.examples[70:78] for label in row["labels"])
    torch.testing.assert_close(torch.as_tensor(loop.compute_loss(model, batch)), expected)


def test_a_model_without_template_trains_and_keeps_the_one_it_got(tmp_path: Path, data: Path):
    base = make_tiny_model(tmp_path / "base", architecture="gpt2", template=False, context=128)
    assert run_task(make_spec(tmp_path / "job", base, data)) == 0
    result = read_json(tmp_path / "job" / "result.json")
    assert result["eval_losses"][-1] < result["eval_losses"][0]
    assert result["max_length"] == 128
    tokenizer = models.load_tokenizer(tmp_path / "job" / "model")
    assert "eos_token" in str(tokenizer.chat_template)
    assert (tmp_path / "job" / "model" / "chat_template.jinja").exists()


def test_rows_that_do_not_fit_are_counted(tmp_path: Path, base: Path):
    long = [{"role": "user", "content": "hola"}, {"role": "assistant", "content": "sí " * 300}]
    write_rows(tmp_path / "train.jsonl", [*dialogues(3, turns=4), *dialogues(2), long])
    tokenizer = models.load_tokenizer(base)
    rows = token_rows(lambda: models.renderer(tokenizer), ("chat", tmp_path / "train.jsonl"), {}, 100)
    assert (len(rows.examples), rows.shortened, rows.dropped) == (5, 3, 1)


def test_a_loss_that_is_no_number_ends_the_job_and_says_so(tmp_path: Path, data: Path):
    base = make_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    model.save_pretrained(base)
    assert run_task(make_spec(tmp_path / "job", base, data)) == 1
    error = read_json(tmp_path / "job" / "error.json")
    assert error["type"] == "TrainingError"
    assert "nan at step 1" in error["message"]
    assert "learning_rate" in error["message"]


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path: Path, data: Path):
    base = make_tiny_model(tmp_path / "base", vocabulary=400)
    make_tiny_model(tmp_path / "other", vocabulary=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.replace(tmp_path / "other" / name, base / name)
    assert run_task(make_spec(tmp_path / "job", base, data)) == 1
    assert "do not belong together" in read_json(tmp_path / "job" / "error.json")["message"]


def test_the_order_depends_on_seed_and_epoch_and_groups_lengths():
    lengths = [(index * 37) % 101 + 1 for index in range(203)]
    sampler = LengthGrouped(lengths, 4, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(203))
    assert first == list(LengthGrouped(lengths, 4, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    batches = [first[at : at + 4] for at in range(0, 200, 4)]
    padding = sum(max(lengths[i] for i in batch) * 4 - sum(lengths[i] for i in batch) for batch in batches)
    assert padding < 0.05 * sum(lengths)


def test_the_machine_where_a_training_first_starts_decides_for_all_its_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage, "free_threads", lambda: 3)
    first = stage.on_this_machine({"output": str(tmp_path), "threads": None, "precision": None})
    monkeypatch.setattr(stage, "free_threads", lambda: 7)
    again = stage.on_this_machine({"output": str(tmp_path), "threads": None, "precision": None})
    assert (first["threads"], first["precision"]) == (3, default_precision())
    assert again == first
    asked = {"output": str(tmp_path / "other"), "threads": 1, "precision": "float32"}
    assert stage.on_this_machine(asked) == asked
