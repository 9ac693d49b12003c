"""The local trainer behind the protocol, with the worker in this process (its death is tested with the worker)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import DataError, LaunchError, ModelUnavailable, TrainingError
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training.local import LocalTrainer
from finetune_assets.training.spec import request_for
from finetune_assets.training.trainer import JobHandle, Trainer, TrainingRequest
from finetune_assets.worker.__main__ import run_task
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model

launched: list[str] = []


def launch(spec_file: Path, output: Path) -> None:
    spec = read_json(spec_file)
    launched.append(spec["task"])
    assert Path(spec["output"]) == output
    if run_task(spec) != 0:
        raise LaunchError("ended badly")


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> TrainingRequest:
    folder = tmp_path_factory.mktemp("request")
    base = make_tiny_model(folder / "base")
    for name, rows in (("train", dialogues(40, turns=2)), ("validation", dialogues(8, seed=9))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in rows), encoding="utf-8")
    settings = {"base_model": str(base), "hyperparameters": {"epochs": 1}, "budget": {"usd_per_hour": 3.6}}
    assistant = Assistant.model_validate({"name": "dental", "select": {"vertical": "dental"}, **settings})
    return request_for(assistant, folder, "f1", "key")[0]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


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


def test_what_cannot_be_trained_is_refused(request_: TrainingRequest, store: Store):
    with pytest.raises(TrainingError, match="qlora"):
        LocalTrainer(launch, store).validate(replace(request_, adapter="qlora"))
