"""One training in two processes: real ones, over gloo on this machine, as one machine and as two; whole and divided."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune_assets.environment import ROOT
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


def start(job: dict[str, Any], output: Path, node: int = 0, **changes: Any) -> subprocess.Popen[bytes]:
    output.mkdir(exist_ok=True)
    file = output / f"spec-{node}.json"
    file.write_text(json.dumps({**job, "output": str(output), "processes": 2, **changes}))
    environment = {**os.environ, "FINETUNE_NODE": str(node), "FINETUNE_DIE_WITH_PARENT": "1"}
    with (output / "stderr.txt").open("ab") as errors:
        command = [sys.executable, "-m", "finetune_assets.worker", str(file)]
        return subprocess.Popen(command, stderr=errors, env=environment)


def wait_for_checkpoint(output: Path, child: subprocess.Popen[bytes]) -> None:
    saved, end = output / "stages" / "0-sft" / "checkpoints", time.monotonic() + 240
    while not list(saved.glob("checkpoint-*")):
        assert child.poll() is None, (output / "stderr.txt").read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for_text(file: Path, text: str) -> str:
    end = time.monotonic() + 120
    while text not in file.read_text():
        assert time.monotonic() < end, file.read_text()[-3000:]
        time.sleep(0.1)
    return file.read_text()


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
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_two_processes_that_divide_the_model_have_the_curve_of_one(
    tmp_path: Path, job: dict[str, Any], alone: Path, adapter: str
):
    """FSDP2. Killed after a checkpoint, it goes on: in two processes again, and from the same checkpoint in one."""
    if adapter == "lora":
        job = make_spec(tmp_path / "alone", Path(job["base_model"]), Path(job["dataset"]), adapter="lora")
        assert run_task(job) == 0
        alone = tmp_path / "alone"
    output, one = tmp_path / "two", tmp_path / "one"
    killed = start(job, output, parallel="fsdp", checkpoint_seconds=0)
    wait_for_checkpoint(output, killed)
    os.kill(int(read_json(output / "worker.json")["pid"]), signal.SIGKILL)
    assert killed.wait(120) != 0
    shutil.copytree(output, one)
    for folder, processes in ((output, 2), (one, 1)):
        child = start(job, folder, parallel="fsdp", processes=processes)
        assert child.wait(300) == 0, (folder / "stderr.txt").read_text()[-3000:]
        result = read_json(folder / "result.json")
        assert (result["processes"], result["resumed"]) == (processes, 1)
        assert result["parallel"] == ("fsdp" if processes > 1 else None)
        assert_alike(folder, alone)
        weights = [load_file(where / "model" / "model.safetensors") for where in (folder, alone)]
        assert weights[0].keys() == weights[1].keys()
        assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-2
        architectures = [read_json(where / "model" / "config.json")["architectures"] for where in (folder, alone)]
        assert architectures[0] == architectures[1]


SEES = """
import os, sys
from finetune_assets.worker import __main__ as worker, loops, shards
from torch.distributed.tensor import DTensor
real = loops.Totals.end_step
def end_step(self):
    real(self)
    parts = [part for part in sees.model.parameters()]
    held = sum(part.to_local().numel() if isinstance(part, DTensor) else part.numel() for part in parts)
    with open(sys.argv[2] + os.environ["RANK"], "w") as file:
        file.write(f"{held} {sum(part.numel() for part in parts)}")
sees = None
enable = shards.enable
def enabled(loop):
    global sees
    sees = loop
    enable(loop)
loops.Totals.end_step, shards.enable = end_step, enabled
sys.exit(worker.main(sys.argv[1:2]))
"""


@pytest.mark.slow
def test_each_process_holds_its_part_alone(tmp_path: Path, job: dict[str, Any]):
    """accelerate alone would leave the model whole in each process of a CPU."""
    spec, script = tmp_path / "spec.json", tmp_path / "sees.py"
    spec.write_text(json.dumps({**job, "output": str(tmp_path / "two"), "processes": 2, "parallel": "fsdp"}))
    script.write_text(SEES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(script), str(spec), str(tmp_path / "held")], check=True, env=environment, capture_output=True)
    for rank in (0, 1):
        held, total = map(int, (tmp_path / f"held{rank}").read_text().split())
        assert held < 0.75 * total


@pytest.mark.slow
def test_two_machines_have_the_curve_of_one(tmp_path: Path, job: dict[str, Any], alone: Path):
    """Two launchers that meet at an address, as on two machines with a shared disk; the second one is killed once."""
    place = {"nodes": 2, "processes": 1, "rendezvous": f"127.0.0.1:{free_port()}"}
    output = tmp_path / "two"
    first = start(job, output, checkpoint_seconds=0, **place)
    assert "FINETUNE_NODE=1 python -m finetune_assets.worker" in wait_for_text(output / "stderr.txt", "Waits for the other 1")
    second = start(job, output, node=1, checkpoint_seconds=0, **place)
    wait_for_checkpoint(output, first)
    second.kill()
    assert first.wait(120) != 0
    assert second.wait(120) != 0
    children = [start(job, output, node=node, **place) for node in (0, 1)]
    for child in children:
        assert child.wait(300) == 0, (output / "stderr.txt").read_text()[-3000:]
    assert start(job, output, node=1, **place).wait(60) == 0  # finished: nothing to wait for
    result = read_json(output / "result.json")
    assert (result["processes"], result["resumed"]) == (2, 1)
    assert_alike(output, alone)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_of_one_process_ends_both_and_the_next_start_goes_on(tmp_path: Path, job: dict[str, Any], alone: Path, rank: int):
    """Which the run makes by itself: where the one that is left has a word to say, it asks for it."""
    output = tmp_path / "two"
    child = start(job, output, checkpoint_seconds=0)
    wait_for_checkpoint(output, child)
    first = int(read_json(output / "worker.json")["pid"])
    workers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    (other,) = set(workers) - {first}
    os.kill(first if rank == 0 else other, signal.SIGKILL)
    assert child.wait(120) != 0
    assert not (output / "result.json").exists()
    assert not (output / "error.json").exists() or read_json(output / "error.json")["restart"]
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


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"FINETUNE_NODES": "many"}, "FINETUNE_NODES='many' makes no sense"),
        ({"FINETUNE_NODES": "2"}, "FINETUNE_RENDEZVOUS='' does not say where they meet.*10.0.0.5:29500"),
        ({"FINETUNE_NODES": "2", "FINETUNE_RENDEZVOUS": "head"}, "does not say where they meet"),
        (
            {"FINETUNE_NODES": "2", "FINETUNE_RENDEZVOUS": "head:29500", "FINETUNE_LAUNCHER": "ray"},
            "FINETUNE_LAUNCHER=subprocess",
        ),
        ({"FINETUNE_PARALLEL": "zero"}, "FINETUNE_PARALLEL='zero' is unknown; write ddp .* or fsdp"),
    ],
)
def test_impossible_machines_are_refused(tmp_path: Path, variables: dict[str, str], says: str):
    with pytest.raises(SettingsError, match=says):
        Workers.read(variables, tmp_path)
    workers = Workers.read({"FINETUNE_NODES": "2", "FINETUNE_RENDEZVOUS": "head:29500", "FINETUNE_PARALLEL": "fsdp"}, tmp_path)
    assert (workers.nodes, workers.rendezvous, workers.parallel) == (2, "head:29500", "fsdp")
