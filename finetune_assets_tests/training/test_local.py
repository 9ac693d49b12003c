"""The local trainer behind the protocol, with the worker in this process (its death is tested with the worker)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import constants

from finetune_assets.errors import DataError, LaunchError, ModelUnavailable, TrainingError
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training import base_model, local, plan
from finetune_assets.training.local import LocalTrainer
from finetune_assets.training.trainer import JobHandle, Trainer, TrainingRequest
from finetune_assets.worker import loops, probe
from finetune_assets.worker.__main__ import run_task
from finetune_assets.workers import Workers
from finetune_assets_tests.tiny_model import make_tiny_model

launched: list[str] = []


def launch(spec_file: Path, output: Path) -> None:
    spec = read_json(spec_file)
    launched.append(spec["task"])
    assert Path(spec["output"]) == output
    if run_task(spec) != 0:
        raise LaunchError("ended badly")


def test_from_estimate_to_model(request_: TrainingRequest, store: Store):
    trainer: Trainer = LocalTrainer(launch, store)
    trainer.validate(request_)
    estimate = trainer.estimate(request_)
    assert (estimate.exact, estimate.peers) == (True, 0)
    assert estimate.usd == pytest.approx(estimate.seconds / 1000)
    launched.clear()
    handle = trainer.submit(request_)
    assert (handle.provider, handle.run_key, handle.fingerprint) == ("local", "key", "f1")
    state = trainer.poll(handle)
    assert state.status == "succeeded"
    result = trainer.result(handle)
    assert result.metrics["tokens"] == estimate.tokens  # the plan's count is what was trained
    assert trainer.estimate(request_).peers == 1
    assert trainer.submit(request_) == handle
    assert launched == ["train"]
    (Path(result.model) / "model.safetensors").unlink()  # not whole any more: made again
    assert trainer.poll(handle).status != "succeeded"
    trainer.submit(request_)
    assert trainer.result(handle).metrics["model_sha256"] == result.metrics["model_sha256"]
    assert launched == ["train", "train"]


def test_a_failed_job_raises_the_workers_error(request_: TrainingRequest, store: Store):
    trainer = LocalTrainer(launch, store)
    empty = request_.dataset / "none"
    empty.mkdir(exist_ok=True)
    request = replace(request_, dataset=empty, fingerprint="none")
    with pytest.raises(DataError, match="missing or empty"):
        trainer.validate(request)
    with pytest.raises(DataError, match="no row that fits"):
        trainer.submit(request)


def test_the_worker_counts_where_the_tokenizer_needs_transformers(request_: TrainingRequest, store: Store):
    exotic = store.home / "base"
    make_tiny_model(exotic)
    expected = LocalTrainer(launch, store).estimate(request_).tokens
    template = exotic / "chat_template.jinja"
    template.write_text(
        "{% set x = namespace() %}{% set x.y = dict(a=1).a | string %}{{ undefined_in_plain.x if false }}" + template.read_text()
    )
    launched.clear()
    assert LocalTrainer(launch, store).estimate(replace(request_, base_model=str(exotic))).tokens >= expected
    (exotic / "tokenizer.json").rename(exotic / "hidden.json")
    with pytest.raises(ModelUnavailable):
        LocalTrainer(launch, store).estimate(replace(request_, base_model=str(exotic)))
    assert launched == ["count_tokens"]


def test_a_model_of_the_hub_is_known_once_the_plan_has_fetched_it(
    request_: TrainingRequest, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """By commit, as the plan fetches it: the cache then has snapshots and no refs/main."""
    cache = store.home / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(base_model, "_asked", lambda *_: ("b" * 40, ""))
    snapshots = cache / "models--org--tiny" / "snapshots"
    request = replace(request_, base_model="org/tiny")
    free = shutil.disk_usage(store.home)

    def fetch(spec_file: Path, output: Path) -> None:
        shutil.copytree(request_.base_model, snapshots / read_json(spec_file)["base_model_identity"]["revision"])
        with monkeypatch.context() as there:  # transformers asks the hub for nothing
            there.setattr(constants, "HF_HUB_OFFLINE", True)
            launch(spec_file, output)

    trainer = LocalTrainer(fetch, store)
    trainer.validate(request)
    assert base_model.shape("org/tiny") is None
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: free._replace(free=1000))
        with pytest.raises(TrainingError, match="GB free\\. Make room"):
            trainer.estimate(request)
    estimate, known = trainer.estimate(request), trainer.estimate(request_)
    assert (estimate.tokens, estimate.memory_bytes) == (known.tokens, known.memory_bytes)
    assert estimate.seconds is not None
    assert base_model.card("org/tiny")["language"] == ["es"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert trainer.estimate(request).memory_bytes == known.memory_bytes
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("a" * 40)  # an older one, whose files are gone
    assert base_model.folder("org/tiny") is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert base_model.folder("org/tiny") == snapshots / ("b" * 40)


def test_states_of_a_job_that_has_not_ended_well(request_: TrainingRequest, store: Store):
    trainer = LocalTrainer(launch, store)
    handle = JobHandle("local", "abc", "", "f")
    folder = store.job("abc")
    assert trainer.poll(handle).status == "pending"
    folder.mkdir(parents=True)
    (folder / "progress.jsonl").write_text('{"stage": "train", "step": 3, "total": 9}\n{"stage": "tr')
    assert (trainer.poll(handle).status, trainer.poll(handle).provider_status) == ("failed", "interrupted")
    assert trainer.poll(handle).progress["step"] == 3
    with FileLock(folder / "worker.lock"):
        assert trainer.poll(handle).status == "running"
    write_json(folder / "error.json", {"type": "TrainingError", "message": "it broke"})
    assert trainer.poll(handle).error == "it broke"
    with pytest.raises(TrainingError, match="it broke"):
        trainer.result(handle)
    trainer.cancel(handle)  # nothing runs: nothing happens


def test_a_killed_worker_is_started_again_but_not_for_ever(request_: TrainingRequest, store: Store):
    tried: list[Path] = []

    def dies(times: int):
        def start(spec_file: Path, output: Path) -> None:
            tried.append(spec_file)
            if len(tried) <= times:
                raise LaunchError("ended from outside")
            launch(spec_file, output)

        return start

    trainer = LocalTrainer(dies(2), store)
    assert trainer.poll(trainer.submit(request_)).status == "succeeded"
    assert len(tried) == 3
    tried.clear()
    with pytest.raises(LaunchError):
        LocalTrainer(dies(9), store).submit(replace(request_, seed=5))
    assert len(tried) == 3


def test_a_cuda_error_is_forgiven_by_a_new_process(request_: TrainingRequest, store: Store, monkeypatch: pytest.MonkeyPatch):
    """In the second epoch, once: the start after it goes on from the checkpoint and ends with the weights of one left alone."""
    failed: list[int] = []
    real = loops.Resumable.training_step

    def training_step(self: loops.Resumable, *rest: Any, **named: Any) -> Any:
        if self.totals.steps == 8 and not failed:
            failed.append(self.totals.steps)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(self, *rest, **named)

    twice = replace(request_, stages=(("sft", replace(request_.hyperparameters, epochs=2)),))
    alone, trainer = LocalTrainer(launch, Store(store.home / "alone")), LocalTrainer(launch, store)
    expected = alone.result(alone.submit(twice)).metrics
    launched.clear()
    monkeypatch.setattr(loops.Resumable, "training_step", training_step)
    result = trainer.result(trainer.submit(twice)).metrics
    assert (failed, launched, result["resumed"]) == ([8], ["train", "train"], 1)
    assert (result["model_sha256"], result["eval_losses"]) == (expected["model_sha256"], expected["eval_losses"])


def test_several_processes_that_run_out_of_memory_start_again_as_often_as_they_can_halve(
    request_: TrainingRequest, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """More often than a kill is forgiven, and not for ever where nothing remembers that they did."""
    tried: list[Path] = []

    def runs_out(times: int):
        def start(spec_file: Path, output: Path) -> None:
            tried.append(spec_file)
            if len(tried) <= times:
                write_json(output / "error.json", {"type": "StartAgain", "message": "memory ran out", "restart": True})
                raise LaunchError("memory ran out")
            launch(spec_file, output)

        return start

    trainer = LocalTrainer(runs_out(5), store)
    assert trainer.poll(trainer.submit(replace(request_, seed=6))).status == "succeeded"
    assert len(tried) == 6
    tried.clear()
    monkeypatch.setattr(local, "MOST_HALVINGS", 3)
    with pytest.raises(LaunchError):
        LocalTrainer(runs_out(99), store).submit(replace(request_, seed=7))
    assert len(tried) == 1 + 3 + local.MOST_RESTARTS


def test_a_probe_of_several_processes_measures_one_with_its_part(
    request_: TrainingRequest, store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "PROBE_ABOVE_SECONDS", 1.0)
    sizes: list[int] = []
    real = probe.make_loop
    monkeypatch.setattr(probe, "make_loop", lambda *args: sizes.append(args[-1].micro_batch) or real(*args))
    estimate = LocalTrainer(launch, store, Workers(processes=2)).estimate(request_)
    assert (estimate.probed, sizes) == (True, [4])
    assert "measured in one of the processes" in estimate.note
    found = read_json(next(store.home.glob("plans/probe-*/result.json")))
    assert found["memory_bytes"] == estimate.memory_bytes
    divided = LocalTrainer(launch, Store(store.home / "other"), Workers(processes=2, parallel="fsdp")).estimate(request_)
    assert divided.probed
    assert divided.memory_bytes != estimate.memory_bytes  # one process cannot show it: the formula


def test_a_long_training_is_probed_once(request_: TrainingRequest, store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "PROBE_ABOVE_SECONDS", 1.0)
    launched.clear()
    estimate = LocalTrainer(launch, store).estimate(request_)
    assert estimate.probed
    assert estimate.seconds is not None
    assert estimate.seconds > plan.START_SECONDS
    assert estimate.memory_bytes is not None
    assert LocalTrainer(launch, store).estimate(request_) == estimate
    assert launched == ["probe"]


def test_a_probe_without_enough_memory_leaves_the_formula_and_says_so(
    request_: TrainingRequest, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Also when the kernel ended it: no word is left then."""
    monkeypatch.setattr(plan, "PROBE_ABOVE_SECONDS", 1.0)

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    def killed(spec_file: Path, output: Path) -> None:
        raise LaunchError("ended from outside")

    formula = LocalTrainer(killed, store).estimate(request_)
    assert (formula.probed, formula.peers) == (False, 0)
    assert "ended from outside" in formula.note
    with monkeypatch.context() as short:
        short.setattr(probe, "ready_model", no_memory)
        estimate = LocalTrainer(launch, store).estimate(request_)
    assert replace(estimate, note="") == replace(formula, note="")
    assert "Memory ran out" in estimate.note
    assert LocalTrainer(launch, store).estimate(request_).probed
