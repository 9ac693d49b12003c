"""Memory that runs out in a training or a probe: really, by a limit, or as the kernel and torch would say it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_assets.errors import TrainingError
from finetune_assets.storage import read_json
from finetune_assets.training import machine
from finetune_assets.worker import loops, memory, ranks, recovery
from finetune_assets.worker.__main__ import run_task
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.recovery import Recovery, disk_full
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model
from finetune_assets_tests.training_jobs import events, losses, make_spec, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", dialogues(96, seed=3))
    return folder


LIMITED = """
import json, resource, sys
from finetune_assets.worker import __main__ as worker
spec = json.load(open(sys.argv[1]))
worker.set_environment(1)
import finetune_assets.worker.train, torch
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
sys.exit(worker.run_task(spec))
"""


def test_memory_that_runs_out_halves_the_micro_batch(tmp_path: Path):
    """A real limit (RLIMIT_DATA) below what a batch of 64 long rows takes, above what a smaller one takes: same loss curve."""
    base = make_tiny_model(tmp_path / "base", hidden=64, vocabulary=2048, context=512)
    long = [{"role": "user", "content": "hola"}, {"role": "assistant", "content": "sí, claro. " * 60}]
    write_rows(tmp_path / "data" / "train.jsonl", [long] * 96)
    values = {"epochs": 1, "batch_size": 64, "max_length": 400}
    spec = make_spec(tmp_path / "free", base, tmp_path / "data", hyperparameters=values)
    assert run_task(spec) == 0
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({**spec, "output": str(tmp_path / "limited")}))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(file), str(700 * 2**20)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = events(tmp_path / "limited", "out_of_memory")
    assert 1 <= len(found) <= 5
    assert found[0]["did"].startswith("micro-batch 64 → 32, 2 of them accumulated for a step of 64")
    assert "memory" in found[0]["cause"]
    assert losses(tmp_path / "limited") == pytest.approx(losses(tmp_path / "free"), abs=2e-3)


@pytest.mark.parametrize(("fits", "tried"), [(2, [8, 4, 2]), pytest.param(0, [8, 4, 2, 1, 1], marks=pytest.mark.slow)])
def test_a_probe_that_runs_out_of_memory_tries_less(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, fits: int, tried: list[int]
):
    """As the training would: a batch that does not fit says so the way torch does; the last one recomputes activations."""
    real, sizes = loops.Resumable.training_step, list[int]()

    def training_step(self: loops.Resumable, model: Any, inputs: Any, *rest: Any, **named: Any) -> torch.Tensor:
        rows = len(inputs["input_ids"])
        if self.totals.steps == 0 and self.totals.tokens == 0:
            sizes.append(rows)
        if rows > fits:
            torch.empty(2**60, dtype=torch.uint8)
        return real(self, model, inputs, *rest, **named)

    monkeypatch.setattr(loops.Resumable, "training_step", training_step)
    assert run_task(make_spec(tmp_path, base, data, task="probe")) == 0
    result = read_json(tmp_path / "result.json")
    assert sizes == tried
    if fits:
        assert (result["probe"], result["micro_batch"]) == (10, 2)
    else:
        assert "Memory ran out" in result["ran_out"]
    assert not (tmp_path / "stages").exists()


def test_out_of_memory_is_bounded(tmp_path: Path):
    one = Recovery(tmp_path, Progress.open(tmp_path), 6)
    for micro_batch in (3, 1):
        one.out_of_memory(4, "no memory")
        assert (one.micro_batch, one.accumulation) == (micro_batch, 6 // micro_batch)
    one.out_of_memory(4, "no memory")
    assert one.state.recompute
    again = Recovery(tmp_path, Progress.open(tmp_path), 6)  # another process knows
    assert (again.micro_batch, again.state.recompute) == (1, True)
    with pytest.raises(TrainingError, match="Lower hyperparameters"):
        again.out_of_memory(4, "no memory")


def test_a_process_that_the_kernel_killed_for_memory_goes_on_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Recovery(tmp_path, Progress.open(tmp_path), 8).begin()  # and dies here
    monkeypatch.setattr(recovery, "killed_for_memory", lambda: machine.killed_for_memory() + 1)
    after = Recovery(tmp_path, Progress.open(tmp_path), 8)
    after.begin()
    assert after.micro_batch == 4
    after.end()
    last = Recovery(tmp_path, Progress.open(tmp_path), 8)
    last.begin()
    assert last.micro_batch == 4


def test_a_kill_on_another_machine_or_before_a_reboot_is_no_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recovery, "boot_id", lambda: "another")
    Recovery(tmp_path, Progress.open(tmp_path), 8).begin()
    monkeypatch.undo()
    monkeypatch.setattr(recovery, "killed_for_memory", lambda: machine.killed_for_memory() + 1)
    after = Recovery(tmp_path, Progress.open(tmp_path), 8)
    after.begin()
    assert (after.micro_batch, after.state.events) == (8, [])


BEGINS = """
import json, os, sys, time
from pathlib import Path
import torch.distributed as processes
from finetune_assets.worker import ranks, recovery
from finetune_assets.worker.progress import Progress
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
processes.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
recovery.killed_for_memory = lambda: 10**9
one = recovery.Recovery(folder, Progress(folder), 16)
ranks.wait()
if rank == 1:
    time.sleep(1)  # comes when the first one has written what it found
one.begin()
(folder / f"rank-{rank}").write_text(str(one.micro_batch))
ranks.wait()
"""


@pytest.mark.slow
def test_several_processes_agree_on_what_the_kernel_did(tmp_path: Path):
    Recovery(tmp_path, Progress.open(tmp_path), 16).begin()  # and dies here
    environment = {**os.environ, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    children = [
        subprocess.Popen([sys.executable, "-c", BEGINS, str(tmp_path)], env={**environment, "RANK": str(rank)}) for rank in (0, 1)
    ]
    assert [child.wait(60) for child in children] == [0, 0]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
    assert len(read_json(tmp_path / "recovery.json")["events"]) == 1


def test_what_counts_as_running_out():
    with memory.limited(), pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**42, dtype=torch.uint8)
    assert memory.ran_out(caught.value)
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not memory.ran_out(RuntimeError("shapes do not fit"))
    assert disk_full(RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 320 vs 214"))
    assert not disk_full(OSError("no such file"))


def test_errors_that_mean_another_process_is_gone(monkeypatch: pytest.MonkeyPatch):
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40412")
    assert not ranks.lost(gone)  # alone there is none
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.lost(gone)
    assert ranks.lost(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    assert not ranks.lost(RuntimeError("shapes do not fit"))
