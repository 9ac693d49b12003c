"""One training in two processes: real ones, over gloo on this machine."""

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

from finetune_assets.errors import SettingsError
from finetune_assets.storage import read_json
from finetune_assets.worker.__main__ import run_task
from finetune_assets.worker.rows import Filled, LengthGrouped
from finetune_assets.workers import Workers
from finetune_assets_tests.tiny_model import dialogues
from finetune_assets_tests.training_jobs import curve, make_spec, write_rows

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, Any]:
    """A spec; 91 rows in batches of 8, so that the last batch of an epoch is short."""
    folder = tmp_path_factory.mktemp("job")
    write_rows(folder / "data" / "train.jsonl", dialogues(46, seed=3) + dialogues(45, seed=4, turns=3))
    write_rows(folder / "data" / "validation.jsonl", dialogues(16, seed=5))
    return make_spec(folder / "one", base, folder / "data")


@pytest.fixture(scope="module")
def alone(job: dict[str, Any]) -> Path:
    assert run_task(job) == 0
    return Path(job["output"])


def start(job: dict[str, Any], output: Path, **changes: Any) -> subprocess.Popen[bytes]:
    output.mkdir(exist_ok=True)
    (output / "spec.json").write_text(json.dumps({**job, "output": str(output), "processes": 2, **changes}))
    with (output / "stderr.txt").open("ab") as errors:
        return subprocess.Popen([sys.executable, "-m", "finetune_assets.worker", str(output / "spec.json")], stderr=errors)


def assert_alike(output: Path, alone: Path) -> None:
    mine, other = (read_json(folder / "result.json") for folder in (output, alone))
    assert (mine["steps"], mine["rows"]) == (other["steps"], other["rows"])
    losses = [[point["loss"] for point in curve(folder) if "loss" in point] for folder in (output, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert mine["eval_losses"] == pytest.approx(other["eval_losses"], abs=2e-2)  # rows fall into other batches


@pytest.mark.slow
def test_two_processes_have_the_curve_of_one(tmp_path: Path, job: dict[str, Any], alone: Path):
    child = start(job, tmp_path / "two")
    assert child.wait(300) == 0, (tmp_path / "two" / "stderr.txt").read_text()[-3000:]
    assert_alike(tmp_path / "two", alone)
    result = read_json(tmp_path / "two" / "result.json")
    assert result["processes"] == 2
    filled = 2 * 2 * (-91 % 8)  # two epochs, rows of two tokens that fill the last batch
    assert result["tokens"] == read_json(alone / "result.json")["tokens"] + filled


@pytest.mark.slow
def test_a_kill_of_one_process_ends_both_and_the_next_start_goes_on(tmp_path: Path, job: dict[str, Any], alone: Path):
    output = tmp_path / "two"
    child = start(job, output, checkpoint_seconds=0)
    saved, end = output / "stages" / "0-sft" / "checkpoints", time.monotonic() + 240
    while not list(saved.glob("checkpoint-*")):
        assert child.poll() is None, (output / "stderr.txt").read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(int(read_json(output / "worker.json")["pid"]), signal.SIGKILL)
    assert child.wait(120) != 0
    assert not (output / "result.json").exists()
    child = start(job, output)
    assert child.wait(300) == 0, (output / "stderr.txt").read_text()[-3000:]
    assert read_json(output / "result.json")["resumed"] == 1
    assert_alike(output, alone)


def test_the_last_batch_is_filled_with_the_row_after_the_last():
    lengths = list(range(1, 14))
    order = list(Filled(LengthGrouped(lengths, 4, 1), 4))
    assert len(order) == len(Filled(LengthGrouped(lengths, 4, 1), 4)) == 16
    assert order[-3:] == [13, 13, 13]
    assert sorted(order[:13]) == list(range(13))


@pytest.mark.parametrize("text", ["0", "two", "-1", "2.5", "100"])
def test_impossible_numbers_of_processes_are_refused(tmp_path: Path, text: str):
    with pytest.raises(SettingsError, match=r"FINETUNE_PROCESSES.*one for each GPU"):
        Workers.read({"FINETUNE_PROCESSES": text}, tmp_path)
