"""The local trainer behind the protocol, with the worker in this process (its death is tested with the worker)."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import DataError, LaunchError, ModelUnavailable, SettingsError, TrainingError
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training import machine, plan
from finetune_assets.training.checks import check_processes
from finetune_assets.training.local import LocalTrainer
from finetune_assets.training.spec import request_for
from finetune_assets.training.trainer import JobHandle, Trainer, TrainingRequest
from finetune_assets.worker import probe
from finetune_assets.worker.__main__ import run_task
from finetune_assets.workers import Workers
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


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"liger": True}, TrainingError, "liger is true, but there is no NVIDIA GPU. Remove the setting"),
        ({"report_to": ("nowhere",)}, SettingsError, "'nowhere' is unknown; allowed: tensorboard, mlflow"),
        ({"report_to": ("dvclive",)}, SettingsError, "needs the package dvclive: pip install dvclive"),
        ({"adapter": "qlora"}, TrainingError, "no NVIDIA GPU.*adapter: lora"),
        ({"objective": ("dpo",)}, DataError, "preferences.jsonl is missing or empty.*take dpo out"),
        ({"objective": ("kto",)}, DataError, "kto.jsonl is missing or empty.*take kto out"),
        ({"objective": ("tools",)}, DataError, "calls a tool.*objective: .sft"),
        ({"objective": ("continued_pretraining",)}, DataError, "holds no .txt or .md file"),
        ({"base_model": "data/no_such_model"}, ModelUnavailable, "there is no folder.*Correct `base_model`"),
        ({"base_model": "org/no-such-model"}, ModelUnavailable, "could not be found"),
    ],
)
def test_what_cannot_be_trained_is_refused(request_: TrainingRequest, store: Store, changes: dict, error: type, says: str):
    if machine.has_gpu() and "adapter" in changes:
        pytest.skip("qlora works here")
    with pytest.raises(error, match=says):
        LocalTrainer(launch, store).validate(replace(request_, stages=(), **changes))


@pytest.mark.parametrize(
    ("workers", "changes", "says"),
    [
        (Workers(processes=3), {}, "batch_size 8 of `sft` cannot be divided among 3 processes.*multiple of 3"),
        (Workers(processes=2, nodes=3), {}, "batch_size 8 of `sft` cannot be divided among 6 processes"),
        (Workers(processes=2), {"objective": ("sft", "dpo")}, "objective `dpo` trains in one process: set FINETUNE_PROCESSES=1"),
        (Workers(processes=64), {}, "FINETUNE_PROCESSES is 64, this machine has"),
        (Workers(processes=2, parallel="fsdp"), {"adapter": "qlora"}, "in 4 bits: set FINETUNE_PARALLEL=ddp"),
    ],
)
def test_impossible_divisions_are_refused(
    request_: TrainingRequest, monkeypatch: pytest.MonkeyPatch, workers: Workers, changes: dict, says: str
):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    wanted = replace(request_, stages=(), **changes)
    check_processes(wanted, Workers())
    check_processes(request_, Workers(processes=2, nodes=2))
    with pytest.raises(SettingsError, match=says):
        check_processes(wanted, workers)


def test_what_this_machine_cannot_hold_is_refused(request_: TrainingRequest, store: Store, monkeypatch: pytest.MonkeyPatch):
    trainer = LocalTrainer(launch, store)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "total_memory", lambda: 2**28)
        with pytest.raises(TrainingError, match=r"GiB of memory for one short row.*adapter: lora"):
            trainer.validate(request_)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
        with pytest.raises(TrainingError, match="GB free\\. Make room"):
            trainer.validate(request_)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "multiplies_bfloat16", lambda: False)
        with pytest.raises(TrainingError, match="precision is bfloat16"):
            trainer.validate(replace(request_, precision="bfloat16"))


def test_a_tokenizer_without_end_or_of_another_model_is_refused(request_: TrainingRequest, store: Store, tmp_path: Path):
    trainer = LocalTrainer(launch, store)
    small, large = make_tiny_model(tmp_path / "small", vocabulary=400), make_tiny_model(tmp_path / "large", vocabulary=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small / name).write_bytes((large / name).read_bytes())
    with pytest.raises(ModelUnavailable, match="tokens, the model embeds 400"):
        trainer.validate(replace(request_, base_model=str(small)))
    config = read_json(large / "tokenizer_config.json")
    write_json(large / "tokenizer_config.json", {key: value for key, value in config.items() if key != "eos_token"})
    with pytest.raises(ModelUnavailable, match="names no end token"):
        trainer.validate(replace(request_, base_model=str(large)))


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_of_another_base_is_refused(request_: TrainingRequest, store: Store, tmp_path: Path, whole: bool):
    """Matrices of another width; embeddings of another vocabulary, trained whole."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = make_tiny_model(tmp_path / "base"), tmp_path / "adapter"
    other = make_tiny_model(tmp_path / "other", **({"vocabulary": 400} if whole else {"hidden": 64}))
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"] if whole else None, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's calls of what transformers deprecates
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    trainer = LocalTrainer(launch, store)
    named = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", {**named, "base_model_name_or_path": str(base)})
    trainer.validate(replace(request_, base_model=str(adapter)))
    write_json(adapter / "adapter_config.json", {**named, "base_model_name_or_path": str(other)})
    with pytest.raises(ModelUnavailable, match=r"does not belong to .*in the base, .* in the adapter"):
        trainer.validate(replace(request_, base_model=str(adapter)))


def test_rows_that_are_cut_are_counted_in_the_plan(request_: TrainingRequest, store: Store):
    short = replace(request_, stages=(("sft", replace(request_.hyperparameters, max_length=48)),))
    estimate = LocalTrainer(launch, store).estimate(short)
    assert estimate.rows_shortened + estimate.rows_left_out > 0
    whole = LocalTrainer(launch, store).estimate(request_)
    assert (whole.rows_shortened, whole.rows_left_out) == (0, 0)


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
