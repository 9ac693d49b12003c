"""The plan's memory beside what trainings took: real ones, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from finetune_assets.environment import ROOT
from finetune_assets.storage import read_json
from finetune_assets.training import base_model, plan, presets
from finetune_assets.training.encoding import LightRenderer
from finetune_assets.training.machine import default_precision
from finetune_assets.training.tokens import token_rows
from finetune_assets.worker import card
from finetune_assets.workers import Workers
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model
from finetune_assets_tests.training_jobs import make_spec, write_rows

pytestmark = pytest.mark.timeout(600)
CLOSE = 0.15
"""Of what was taken."""
LENGTH = 256


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """27 million weights, whose gradients, moments and copy are half of the memory; eleven steps of short and long rows."""
    folder = tmp_path_factory.mktemp("memory")
    base = make_tiny_model(folder / "base", hidden=512, layers=8, heads=8, intermediate=1408, vocabulary=2048)
    write_rows(folder / "data" / "train.jsonl", dialogues(48, seed=3) + dialogues(40, seed=4, turns=4))
    values = {"epochs": 1, "batch_size": 8, "max_length": LENGTH}
    return make_spec(folder / "job", base, folder / "data", hyperparameters=values, precision=default_precision())


def taken(spec: dict[str, Any], output: Path, **changes: Any) -> int:
    """Bytes at the peak."""
    output.mkdir()
    (output / "spec.json").write_text(json.dumps({**spec, "output": str(output), **changes}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "finetune_assets.worker", str(output / "spec.json")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return int(read_json(output / "result.json")["memory_bytes"])


@pytest.mark.slow
def test_the_plan_knows_what_a_training_and_its_checkpoints_take(tmp_path: Path, spec: dict[str, Any]):
    shape = base_model.shape(spec["base_model"])
    assert shape is not None
    assert shape.parameters > 25e6
    values = presets.of_stage("tiny", "sft", "full", {"batch_size": 8, "max_length": LENGTH})
    base = Path(spec["base_model"])
    rows = token_rows(lambda: LightRenderer(base), ("chat", Path(spec["dataset"]) / "train.jsonl"), {}, LENGTH)
    alone, copy = plan.estimate_memory(shape, values, max(rows.lengths)), plan.checkpoint_memory(shape, values, "full")
    without = taken(spec, tmp_path / "without", checkpoint_seconds=1e9)
    assert alone == pytest.approx(without, rel=CLOSE)
    with_checkpoints = taken(spec, tmp_path / "with", checkpoint_seconds=1e-9)
    assert alone + copy == pytest.approx(with_checkpoints, rel=CLOSE)
    assert copy == pytest.approx(with_checkpoints - without, rel=0.3)
    assert taken(spec, tmp_path / "probe", task="probe") == pytest.approx(with_checkpoints, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_plan_knows_what_each_of_two_processes_takes(tmp_path: Path, spec: dict[str, Any], parallel: str):
    shape = base_model.shape(spec["base_model"])
    assert shape is not None
    values = presets.of_stage("tiny", "sft", "full", {"batch_size": 8, "max_length": LENGTH})
    base = Path(spec["base_model"])
    rows = token_rows(lambda: LightRenderer(base), ("chat", Path(spec["dataset"]) / "train.jsonl"), {}, LENGTH)
    expected = plan.process_memory(shape, ("sft", values), max(rows.lengths), "full", Workers(processes=2, parallel=parallel))
    found = taken(spec, tmp_path / parallel, processes=2, parallel=parallel, checkpoint_seconds=1e9)
    assert 0.85 * found < expected < 1.35 * found  # rather too much than too little


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_what_measures_a_gpu_runs(tmp_path: Path, adapter: str):
    """The benchmark of a GPU in miniature, on whatever this machine has: its own parts, TRL's, and the estimate."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 4096}
    config = {**gpu.QWEN, **small, "max_position_embeddings": 256}
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.md").write_text("Una frase de prueba, ni corta ni larga. " * 2000, encoding="utf-8")
    ours, theirs, estimated = gpu.measured(config, adapter, tmp_path / "job", tmp_path / "text", length=128)
    assert ours["probe"] == 10
    assert min(ours["tokens_per_second"], theirs["tokens_per_second"]) > 0
    assert 0 < estimated < 2**31


def test_a_hot_card_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path):
    from finetune_assets.worker.__main__ import run_task

    monkeypatch.setattr(card, "facts", lambda: {"gpu_percent": 97, "gpu_celsius": 91})
    monkeypatch.setattr("finetune_assets.worker.watch.PROGRESS_SECONDS", 0.0)
    write_rows(tmp_path / "data" / "train.jsonl", dialogues(16, seed=3))
    assert run_task(make_spec(tmp_path / "job", base, tmp_path / "data")) == 0
    told = [json.loads(line) for line in (tmp_path / "job" / "progress.jsonl").read_text().splitlines()]
    assert sum("91 °C" in event.get("note", "") for event in told) == 1
    steps = [event for event in told if "gpu_percent" in event]
    assert {"learning_rate", "grad_norm", "memory_gib", "loss"} <= steps[-1].keys()
