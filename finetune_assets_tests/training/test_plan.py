"""Presets, the spec's hash, the plan and its budget."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import BudgetExceeded, ModelUnavailable, SettingsError
from finetune_assets.storage import Store, write_json
from finetune_assets.training import base_model, candidates, plan, presets
from finetune_assets.training.base_model import Shape
from finetune_assets.training.encoding import LightRenderer
from finetune_assets.training.local import LocalTrainer
from finetune_assets.training.spec import request_for, spec_hash, train_spec
from finetune_assets.training.tokens import token_rows
from finetune_assets.training.trainer import Estimate
from finetune_assets.worker import attention, targets
from finetune_assets.workers import Workers
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


def assistant(base: Path, **settings: object) -> Assistant:
    return Assistant.model_validate({"name": "dental", "select": {"vertical": "dental"}, "base_model": str(base), **settings})


def test_the_preset_is_the_assistants_else_the_cards_else_default(base: Path):
    assert presets.preset_name("aggressive", {"preset": "tiny"}) == "aggressive"
    assert presets.preset_name(None, base_model.card(str(base))) == "tiny"
    assert presets.preset_name(None, {}) == "default"
    with pytest.raises(SettingsError, match="card is 'nonsense'; allowed: default, conservative, aggressive, tiny"):
        presets.preset_name(None, {"preset": "nonsense"})


@pytest.mark.parametrize(
    ("preset", "overrides", "named"),
    [
        ("default", {}, []),
        ("default", {"learning_rate": 1e-7}, ["learning_rate"]),
        ("aggressive", {"learning_rate": 2e-3, "epochs": 6}, ["learning_rate", "epochs"]),
        ("tiny", {"learning_rate": 2e-3, "epochs": 8}, []),
    ],
)
def test_warnings_are_for_pretrained_models(preset: str, overrides: dict[str, float], named: list[str]):
    found = presets.warnings(preset, presets.resolve(preset, overrides))
    assert [text.split()[0] for text in found] == named


def test_the_hash_covers_what_decides_the_result(base: Path, tmp_path: Path):
    store = Store(tmp_path)
    request, _ = request_for(assistant(base), tmp_path, "f1")
    spec = train_spec(request, store)
    same = replace(request, dataset=tmp_path / "elsewhere", assistant="other", run_key="k", usd_per_hour=1.0)
    assert train_spec(same, store, workers=Workers("ray", cpus=7))["spec_hash"] == spec["spec_hash"]
    quiet = replace(request, stages=(("sft", replace(request.hyperparameters, log_steps=1)),))
    assert train_spec(quiet, store)["spec_hash"] == spec["spec_hash"]
    longer = replace(request, stages=(("sft", replace(request.hyperparameters, epochs=2)),))
    asked = [replace(request, precision="float32"), replace(request, precision="bfloat16"), replace(request, liger=True)]
    others = [replace(request, fingerprint="f2"), replace(request, seed=1), longer, *asked]
    assert len({spec["spec_hash"], *(train_spec(other, store)["spec_hash"] for other in others)}) == 7
    assert spec_hash({name: value for name, value in spec.items() if name != "asked"}) == spec["spec_hash"]  # as before


def test_a_precision_that_is_set_later_is_not_ignored(base: Path, tmp_path: Path):
    store = Store(tmp_path)
    request, _ = request_for(assistant(base), tmp_path, "f1")
    begun = train_spec(request, store)
    write_json(Path(begun["output"]) / "spec.json", begun)
    other = "float32" if begun["precision"] == "bfloat16" else "bfloat16"
    assert train_spec(replace(request, precision=other), store)["precision"] == other


def test_threads_and_precision_stay_as_first_started(base: Path, tmp_path: Path):
    store = Store(tmp_path)
    request, _ = request_for(assistant(base), tmp_path, "f1")
    first = {**train_spec(request, store, workers=Workers("ray", cpus=3)), "precision": "float32"}
    write_json(Path(first["output"]) / "spec.json", first)
    elsewhere = train_spec(request, Store(store.home / "other"), workers=Workers("kubernetes", processes=4))
    assert (elsewhere["threads"], elsewhere["precision"], elsewhere["processes"]) == (None, None, 4)  # that machine decides
    assert elsewhere["spec_hash"] == first["spec_hash"]
    again = train_spec(request, store, workers=Workers("ray", cpus=1))
    assert (again["threads"], again["precision"]) == (3, "float32")


def test_a_models_identity_is_its_content(base: Path, tmp_path: Path):
    other = make_tiny_model(tmp_path / "same")
    assert base_model.identity(str(other)) == base_model.identity(str(base))
    (other / "README.md").write_text("another card")
    assert base_model.identity(str(other)) == base_model.identity(str(base))
    (other / "tokenizer_config.json").write_text("{}")
    assert base_model.identity(str(other)) != base_model.identity(str(base))
    with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE"):
        base_model.identity("no/such-model")


def test_shape_is_read_without_loading(base: Path):
    from transformers import AutoModelForCausalLM

    shape = base_model.shape(str(base))
    assert shape is not None
    assert shape.parameters == AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert (shape.layers, shape.hidden, shape.heads, shape.vocabulary, shape.context) == (2, 32, 2, 512, 512)


def test_tokens_are_counted_after_trimming(base: Path, tmp_path: Path):
    file = tmp_path / "train.jsonl"
    long = [{"role": "user", "content": "hola"}, {"role": "assistant", "content": "sí " * 300}]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in [*dialogues(3, turns=4), *dialogues(2), long]))
    count = plan.counted(token_rows(lambda: LightRenderer(base), ("chat", file), {}, 100))
    assert (count.rows, count.shortened, count.dropped) == (5, 3, 1)
    assert count.longest <= 100
    assert count.tokens <= 500


SMALL = Shape(3_000_000, 0, 6, 192, 6, 2048, 512)
LARGE = Shape(494_000_000, 0, 24, 896, 14, 151_936, 32_768)


def test_time_comes_from_earlier_jobs_of_the_model_on_this_machine(base: Path, tmp_path: Path):
    request, _ = request_for(assistant(base, hyperparameters={"epochs": 3}), tmp_path, "f1")
    count = plan.TokenCount(1000, 200_000, 300, 0, 0)
    by_size = plan.estimate(request, [count], SMALL, [], (2, "bfloat16"))
    assert by_size.tokens == 600_000
    assert by_size.seconds is not None
    assert 60 < by_size.seconds < 150
    peers = [{"tokens_per_second": rate, "memory_bytes": 7} for rate in (900, 1000, 5000)]
    measured = plan.estimate(request, [count], SMALL, peers, (2, "bfloat16"))
    assert (measured.seconds, measured.memory_bytes, measured.peers) == (plan.START_SECONDS + 600, 7, 3)
    probed = plan.estimate(request, [count], SMALL, [{"probe": 10, "tokens_per_second": 500, "memory_bytes": 9}], (2, "float32"))
    assert (probed.seconds, probed.memory_bytes, probed.peers, probed.probed) == (plan.START_SECONDS + 1200, 9, 0, True)
    assert plan.estimate(request, [count], None, [], (2, "float32")).seconds is None


def test_earlier_jobs_are_those_of_as_many_processes(base: Path, tmp_path: Path):
    store = Store(tmp_path)
    request, _ = request_for(assistant(base), tmp_path, "f1")
    identity, values = base_model.identity(str(base)), request.hyperparameters
    alike = {"base_model_identity": identity, "host": os.uname().nodename, "objective": ["sft"], "adapter": "full"}
    alike["hyperparameters"] = {"batch_size": values.batch_size, "max_length": values.max_length}
    ways = {"one": {}, "ddp": {"processes": 2, "parallel": "ddp"}, "fsdp": {"processes": 2, "parallel": "fsdp"}}
    for name, way in ways.items():
        write_json(store.job(name) / "result.json", {**alike, **way, "spec_hash": name})
    asked = {"one": Workers(parallel="fsdp"), "ddp": Workers(nodes=2), "fsdp": Workers(processes=2, parallel="fsdp")}
    for name, workers in asked.items():
        assert [found["spec_hash"] for found in plan.finished_peers(store, identity, request, workers)] == [name]
    assert plan.finished_peers(store, identity, request, Workers(processes=4)) == []


def test_several_processes_divide_the_batch_and_with_fsdp_the_weights():
    stage = ("sft", replace(presets.PRESETS["default"], batch_size=8))
    alone, ddp, fsdp = (
        plan.process_memory(LARGE, stage, 512, "full", workers)
        for workers in (Workers(), Workers(processes=4), Workers(processes=4, parallel="fsdp"))
    )
    smaller = plan.estimate_memory(LARGE, replace(stage[1], batch_size=2), 512)
    assert alone == plan.estimate_memory(LARGE, stage[1], 512)
    assert ddp == smaller + 4 * LARGE.parameters  # DistributedDataParallel's buckets
    assert fsdp == pytest.approx(smaller - 18 * LARGE.parameters * 3 / 4, rel=1e-6)
    large = plan.process_memory(LARGE, stage, 64, "full", Workers(processes=64, parallel="fsdp"))
    assert large >= plan.RUNTIME_BYTES + 4 * LARGE.parameters  # each reads the whole model first


def test_candidates_are_held_against_the_machine_that_trains(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": dialogues(1)[0]}) + "\n")
    settings = assistant(base, candidates=[str(make_tiny_model(tmp_path / "wide", hidden=64)), "data/no_such_model"])
    request, _ = request_for(settings, tmp_path, "f1")
    trainer = LocalTrainer(lambda *_: None, Store(tmp_path))
    estimate = trainer.estimate(request)
    small = [str(base), str(tmp_path / "wide"), "data/no_such_model"]
    monkeypatch.setattr(candidates.machine, "room", lambda: estimate.memory_bytes)
    for here, names, fits in ((True, small, [True, False, False]), (False, [small[1], small[0], small[2]], [None, None, False])):
        found = candidates.ranked(settings, trainer, request, estimate, here=here)
        assert [one.base_model for one in found] == names
        assert [one.fits for one in found] == fits
        assert ("more memory" in " ".join(one.remark for one in found)) == here


def test_a_chain_takes_the_time_of_its_stages(base: Path, tmp_path: Path):
    request, _ = request_for(assistant(base, objective=["sft", "dpo"]), tmp_path, "f1")
    count = plan.TokenCount(100, 100_000, 300, 0, 0)
    both = plan.estimate(request, [count, count], SMALL, [], (1, "float32"))
    alone = plan.estimate(replace(request, stages=request.stages[:1]), [count], SMALL, [], (1, "float32"))
    assert both.tokens == alone.tokens + 100_000  # dpo runs for one epoch
    assert both.seconds is not None
    assert alone.seconds is not None
    assert both.seconds - alone.seconds == pytest.approx((alone.seconds - plan.START_SECONDS) / 3 * 4 / 3)


def test_a_probe_tells_of_the_first_stage_and_the_formula_of_the_others_beside_it(base: Path, tmp_path: Path):
    request, _ = request_for(assistant(base, objective=["sft", "dpo"]), tmp_path, "f1")
    counts = [plan.TokenCount(100, 100_000, 100, 0, 0), plan.TokenCount(100, 100_000, 500, 0, 0)]
    formula = plan.estimate(request, counts, LARGE, [], (1, "float32"))
    alone = plan.estimate(replace(request, stages=request.stages[:1]), counts[:1], LARGE, [], (1, "float32"))
    assert alone.memory_bytes is not None
    assert formula.memory_bytes is not None
    assert formula.seconds is not None
    probe = {"probe": 10, "tokens_per_second": 1000, "memory_bytes": 2 * alone.memory_bytes}  # the formula says half of it
    probed = plan.estimate(request, counts, LARGE, [probe], (1, "float32"))
    assert probed.memory_bytes == pytest.approx(2 * formula.memory_bytes)
    assert probed.seconds == pytest.approx(plan.START_SECONDS + 300 + 100 * 4 / 3)  # dpo's reference is a third more


def test_earlier_jobs_tell_what_lies_around_their_loop(base: Path, tmp_path: Path):
    request, _ = request_for(assistant(base), tmp_path, "f1")
    count, rate = plan.TokenCount(100, 100_000, 100, 0, 0), {"tokens_per_second": 1000, "seconds": 300.0}
    peers = [{**rate, "wall_seconds": 307.0}, {**rate, "wall_seconds": 309.0}, rate]  # the last is of an earlier version
    assert plan.estimate(request, [count], SMALL, peers, (1, "float32")).seconds == 8 + 300


def test_the_formula_knows_the_workers_limits():
    assert (plan.SCORES_LENGTH, plan.LOGITS) == (attention.LENGTH, targets.LOGITS)


def test_memory_grows_with_model_and_batch_and_shrinks_with_an_adapter():
    values = presets.PRESETS["tiny"]
    assert plan.estimate_memory(SMALL, values, 512) < 2 * 2**30
    assert plan.estimate_memory(LARGE, values, 512) > 18 * LARGE.parameters
    assert plan.estimate_memory(SMALL, replace(values, batch_size=16), 512) > plan.estimate_memory(SMALL, values, 512)
    copies = [plan.checkpoint_memory(LARGE, values, adapter) for adapter in ("lora", "full")]
    assert copies == [12 * 18 * 8 * 896 * 24, 12 * LARGE.parameters]
    sizes = [plan.estimate_memory(LARGE, values, 512, adapter) for adapter in ("qlora", "lora", "full")]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("budget", "usd", "seconds", "error", "says"),
    [
        ({}, 99.0, 1e6, None, ""),
        ({"training_usd": 1.0, "usd_per_hour": 1.0}, 0.5, 1.0, None, ""),
        (
            {"training_usd": 1.0, "usd_per_hour": 1.0},
            2.5,
            1.0,
            BudgetExceeded,
            r"\$2\.50, the limit is \$1\.00.*budget\.training_usd",
        ),
        ({"training_usd": 0.001, "usd_per_hour": 1.0}, 0.0025, 1.0, BudgetExceeded, r"\$0\.0025, the limit is \$0\.0010"),
        ({"training_usd": 1.0}, None, 1.0, SettingsError, r"Set budget\.usd_per_hour"),
        ({"hours": 1.0}, None, 7300.0, BudgetExceeded, r"2 hours, the limit is 1.*budget\.hours"),
        ({"hours": 1.0}, None, None, SettingsError, r"budget\.hours"),
    ],
)
def test_a_plan_above_the_budget_is_refused(base: Path, budget: dict, usd, seconds, error, says: str):
    settings = assistant(base, budget=budget)
    estimated = Estimate(tokens=1, exact=True, seconds=seconds, usd=usd, memory_bytes=1)
    if error is None:
        plan.check_budget(settings, estimated)
        return
    with pytest.raises(error, match=says):
        plan.check_budget(settings, estimated)
