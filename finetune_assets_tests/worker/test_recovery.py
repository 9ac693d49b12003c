"""What a training does about its own trouble; each test causes it. Of memory: `test_out_of_memory`."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import kills
from finetune_assets.storage import read_json, write_json
from finetune_assets.worker import checkpoints, loops, watch
from finetune_assets.worker import curve as training_log
from finetune_assets.worker.__main__ import run_task
from finetune_assets.worker.loops import Totals
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.recovery import Diverged, Recovery
from finetune_assets_tests.tiny_model import dialogues
from finetune_assets_tests.training_jobs import curve, events, losses, make_spec, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", dialogues(96, seed=3))
    write_rows(folder / "validation.jsonl", dialogues(16, seed=5))
    return folder


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    output = tmp_path_factory.mktemp("untroubled")
    assert run_task(make_spec(output, base, data)) == 0
    return output


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("micro_batch", [8, 1])
def test_equal_configurations_have_equal_curves(
    tmp_path: Path, untroubled: Path, base: Path, data: Path, layout: str, micro_batch: int
):
    """8 × 1 = 1 × 8 accumulated; padded = packed without padding, documents kept apart."""
    stage = tmp_path / "stages" / "0-sft"
    write_json(stage / "recovery.json", {"micro_batch": micro_batch})
    assert run_task(make_spec(tmp_path, base, data, layout=layout)) == 0
    assert losses(tmp_path) == pytest.approx(losses(untroubled), abs=2e-3)
    mine, other = (read_json(folder / "result.json") for folder in (tmp_path, untroubled))
    assert mine["eval_losses"] == pytest.approx(other["eval_losses"], abs=2e-3)
    assert (mine["tokens"], mine["steps"]) == (other["tokens"], other["steps"])


def test_a_loss_that_becomes_nan_goes_back_and_on_more_slowly(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """NaN is injected at step 15 of the first attempt, after the checkpoint of the first epoch."""
    real, injected = Totals.end_step, []

    def end_step(self: Totals) -> None:
        if self.steps == 14 and not injected:
            injected.append(self.steps)
            self.step_loss = math.nan
        real(self)

    monkeypatch.setattr(loops.Totals, "end_step", end_step)
    assert run_task(make_spec(tmp_path, base, data)) == 0
    (event,) = events(tmp_path, "diverged")
    assert event["step"] == 15
    assert event["did"] == "back to step 12, learning rate 0.001 → 0.0005"
    assert "nan" in event["cause"]
    assert read_json(tmp_path / "result.json")["resumed"] == 0  # it was this process that went back
    rates = {point["step"]: point["learning_rate"] for point in curve(tmp_path) if "learning_rate" in point}
    assert rates[20] < rates[10] / 2
    assert "recovery" in (tmp_path / "training_log.jsonl").read_text()
    assert read_json(tmp_path / "result.json")["eval_loss"] < 6.2


@pytest.mark.parametrize(
    ("what", "step"),
    [
        ("gradient", 15),
        pytest.param("gradient", 24, marks=pytest.mark.slow),
        pytest.param("weights", 12, marks=pytest.mark.slow),
        pytest.param("weights", 15, marks=pytest.mark.slow),
    ],
)
def test_no_number_in_gradient_or_weights_is_kept(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, what: str, step: int
):
    """The loss of the step is finite. Weights are spoilt before a validation (12), or a checkpoint (15); 24 is the last step."""
    spoil_once(monkeypatch, what, step)
    assert run_task(make_spec(tmp_path, base, data, checkpoint_seconds=0)) == 0
    (event,) = events(tmp_path, "diverged")
    assert event["step"] == step
    assert event["did"].startswith(f"back to step {step - 1},")
    assert re.search("norm of the gradient|NaN|nan", event["cause"])
    assert math.isfinite(read_json(tmp_path / "result.json")["eval_loss"])
    assert_finite(tmp_path / "model")


def test_weights_that_the_last_step_spoils_are_not_the_model(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is validated, and nothing looks at the loss of the last weights."""
    shutil.copytree(data, tmp_path / "data")
    write_rows(tmp_path / "data" / "validation.jsonl", [])
    spoil_once(monkeypatch, "weights", 24)
    assert run_task(make_spec(tmp_path / "job", base, tmp_path / "data")) == 0
    (event,) = events(tmp_path / "job", "diverged")
    assert (event["step"], event["cause"]) == (24, "weights became NaN or infinite")
    assert_finite(tmp_path / "job" / "model")


def spoil_once(monkeypatch: pytest.MonkeyPatch, what: str, step: int) -> None:
    """One NaN in the gradient before the optimiser's step, or in the weights after it."""
    spoilt: list[int] = []
    real_step, real_end = loops.Resumable.training_step, watch.Watch.on_step_end
    real_save = loops.Resumable._may_save  # pyright: ignore[reportPrivateUsage]

    def training_step(self: loops.Resumable, model: torch.nn.Module, *rest: Any, **named: Any) -> torch.Tensor:
        loss = real_step(self, model, *rest, **named)
        if what == "gradient" and self.totals.steps == step and not spoilt:
            spoilt.append(step)
            gradient = next(weight.grad for weight in model.parameters() if weight.grad is not None)
            gradient.view(-1)[0] = math.nan
        return loss

    def on_step_end(self: watch.Watch, args: Any, state: Any, control: Any, **named: Any) -> None:
        if what == "weights" and state.global_step == step and not spoilt:
            spoilt.append(step)
            with torch.no_grad():
                next(named["model"].parameters()).view(-1)[0] = math.nan
        real_end(self, args, state, control, **named)

    def may_save(self: loops.Resumable, folder: Path) -> bool:
        self.settle()  # the checkpoint before is written: none is left out
        return real_save(self, folder)

    monkeypatch.setattr(loops.Resumable, "_may_save", may_save)
    monkeypatch.setattr(loops.Resumable, "training_step", training_step)
    monkeypatch.setattr(watch.Watch, "on_step_end", on_step_end)


def assert_finite(model: Path) -> None:
    assert all(bool(weight.isfinite().all()) for weight in load_file(model / "model.safetensors").values())


def test_a_loss_that_explodes_is_seen_and_the_recoveries_are_bounded(tmp_path: Path, base: Path, data: Path):
    """A real divergence: a learning rate that no factor of eight saves."""
    values = {"learning_rate": 60.0, "warmup": 0.0, "epochs": 4}
    assert run_task(make_spec(tmp_path, base, data, hyperparameters=values)) == 1
    error = read_json(tmp_path / "error.json")
    assert error["type"] == "TrainingError"
    assert "3 times a lower rate did not help. Lower hyperparameters.learning_rate" in error["message"]
    state = read_json(tmp_path / "stages" / "0-sft" / "recovery.json")
    assert (state["rate"], len(state["events"])) == (0.125, 3)


def test_checkpoints_are_taken_of_good_weights_only():
    totals = Totals()
    for loss in [3.0] * 20:
        totals.step_loss = loss
        totals.end_step()
    assert totals.good
    while totals.mean < 4.7:
        totals.step_loss = 9.0
        totals.end_step()
        assert totals.good == (totals.mean <= 3.8)
    totals.step_loss = 9.0
    with pytest.raises(Diverged, match="rose from 3 to"):
        totals.end_step()


@pytest.mark.parametrize("kept", [1, 3])
def test_as_many_checkpoints_stay_as_asked(tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, kept: int):
    real, seen = checkpoints.prune, list[int]()

    def prune(folder: Path, kept: int) -> None:
        real(folder, kept)
        seen.append(len(checkpoints.listed(folder)))

    monkeypatch.setattr(checkpoints, "prune", prune)
    assert run_task(make_spec(tmp_path, base, data, checkpoints=kept, checkpoint_seconds=1e-9)) == 0
    assert max(seen) == kept


def test_validation_that_gets_no_better_ends_the_training(tmp_path: Path, base: Path, data: Path):
    """Eight rows learnt by heart: validation loss rises, and the weights of its lowest point are the model."""
    write_rows(tmp_path / "data" / "train.jsonl", dialogues(8, seed=1))
    shutil.copy(data / "validation.jsonl", tmp_path / "data")
    values = {"epochs": 50, "learning_rate": 2e-2, "patience": 2}
    assert run_task(make_spec(tmp_path / "job", base, tmp_path / "data", hyperparameters=values)) == 0
    result = read_json(tmp_path / "job" / "result.json")
    assert result["steps"] < 50
    assert result["steps"] == result["best_step"] + 2
    assert result["eval_loss"] == min(result["eval_losses"])
    (event,) = events(tmp_path / "job", "early_stop")
    assert f"the weights of step {result['best_step']} are kept" in event["did"]


def test_a_disk_that_stays_full_is_one_event_that_counts(tmp_path: Path):
    one = Recovery(tmp_path, Progress.open(tmp_path), 8)
    for step in (5, 10, 15):
        one.record("disk_full", step, "older checkpoints deleted", "no room for a checkpoint")
        one.record("disk_full", step, "goes on without this checkpoint", "still no room for it")
    found = read_json(tmp_path / "recovery.json")["events"]
    assert [(event["step"], event["times"], event["last_step"]) for event in found] == [(5, 3, 15), (5, 3, 15)]
    assert len((tmp_path / "training_log.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "progress.jsonl").read_text().count("note") == 2


FILLS = """
import json, resource, signal, sys
from pathlib import Path
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.recovery import Recovery
folder = Path(sys.argv[1])
log = folder / "training_log.jsonl"
one = Recovery(folder, Progress(folder), 8)
one.record("resumed", 1, "goes on from its checkpoint")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\\n" for step in range(1000)))
resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 20, resource.RLIM_INFINITY))
one.record("resumed", 2, "goes on from its checkpoint")
"""


def test_a_log_that_cannot_grow_stays_whole_and_half_a_line_is_left_out(tmp_path: Path):
    """A real limit (RLIMIT_FSIZE) leaves room for half of the line."""
    subprocess.run([sys.executable, "-c", FILLS, str(tmp_path)], check=True)
    log = tmp_path / "training_log.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1000))
    with log.open("a") as file:
        file.write('{"step": 1000, "lo')
    Recovery(tmp_path, Progress.open(tmp_path), 8).record("resumed", 1001, "goes on from its checkpoint")
    assert [entry["step"] for entry in training_log.read(log)][-2:] == [999, 1001]


def small_disk(folder: Path, megabytes: int) -> Path:
    """A file system of its own, where this user may mount one."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("needs to mount a tmpfs")
    return folder


def test_a_full_disk_costs_checkpoints_and_ends_with_the_mend(tmp_path: Path, base: Path, data: Path, untroubled: Path):
    """First not even the weights fit, then no second checkpoint, then there is room: the same model as without trouble."""
    disk = small_disk(tmp_path / "disk", 2)
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes(1920 * 1024))
        spec = make_spec(disk / "job", base, data, checkpoint_seconds=1e-9)
        assert run_task(spec) == 1
        error = read_json(disk / "job" / "error.json")
        assert error["type"] == "TrainingError"
        assert "is full" in error["message"]
        assert "Make room and start the same again" in error["message"]
        filler.write_bytes(bytes(1200 * 1024))
        run_task(spec)
        progress = (disk / "job" / "progress.jsonl").read_text()
        assert "no room for a checkpoint: older checkpoints deleted" in progress
        filler.unlink()
        assert run_task(spec) == 0
        result, expected = read_json(disk / "job" / "result.json"), read_json(untroubled / "result.json")
        assert result["model_sha256"] == expected["model_sha256"]
        assert not list((disk / "job").rglob(".tmp-*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


INTERVAL, SLACK, KILLS = 0.3, 1.0, 10
"""Seconds between checkpoints; what writing one, and noticing it, may take on a busy machine; kills."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_ten_kills_at_random_moments_lose_an_interval_each(tmp_path: Path, base: Path, data: Path, adapter: str):
    """The same weights, losses and curve as without kills, no file left broken, and no kill costs more than an interval."""
    long = {"epochs": 20 * KILLS, "patience": 20 * KILLS}
    spec = make_spec(tmp_path / "whole", base, data, adapter=adapter, hyperparameters=long)
    assert run_task(spec) == 0
    output, file = tmp_path / "killed", tmp_path / "spec.json"
    write_json(file, {**spec, "output": str(output), "checkpoint_seconds": INTERVAL})
    seen = kills.killed(file, KILLS, random.Random(1), kills.moments(INTERVAL, SLACK))
    assert len(seen.lost) == KILLS
    assert max(seen.lost) < INTERVAL + SLACK
    assert not seen.broken
    result, expected = (read_json(folder / "result.json") for folder in (output, tmp_path / "whole"))
    for name in ("model_sha256", "steps", "tokens", "eval_losses", "train_loss"):
        assert result[name] == expected[name], name
    assert curve(output) == curve(tmp_path / "whole")
