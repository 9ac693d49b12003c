"""A version is made again from what it keeps, and exported for any server."""

from __future__ import annotations

import datetime
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_assets.errors import DataError, LaunchError, ModelUnavailable, TrainingError
from finetune_assets.registry import Version
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training import base_model
from finetune_assets.training.publish import publish, whole_model
from finetune_assets.training.reproduce import export, reproduce
from finetune_assets.worker import models
from finetune_assets.worker.__main__ import run_task
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model
from finetune_assets_tests.training_jobs import make_spec, write_rows


def launch(spec_file: Path, _output: Path) -> None:
    if run_task(read_json(spec_file)) != 0:
        raise LaunchError("ended badly")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Version]:
    store = Store(tmp_path_factory.mktemp("store"))
    base = make_tiny_model(store.home / "base")
    dataset = store.dataset("dental", "f")
    write_rows(dataset / "train.jsonl", dialogues(32))
    write_rows(dataset / "validation.jsonl", dialogues(8, seed=2))
    write_json(dataset / "manifest.json", {"fingerprint": "f"})
    spec = make_spec(store.job("h"), base, dataset, adapter="lora")
    write_json(store.job("h") / "spec.json", spec)
    assert run_task(spec) == 0
    folder = store.model("dental", "v1-abc")
    publish(store.job("h"), folder)
    now = datetime.datetime.now(datetime.UTC)
    return store, Version("dental", 1, "v1-abc", "c", "job", "f", str(base), str(folder), now, None, None, None, None)


def test_a_version_is_made_again_bit_for_bit(made: tuple[Store, Version]):
    store, version = made
    again = reproduce(store, version, launch)
    assert (again.identical, again.farthest, again.changed) == (True, 0.0, {})


def test_a_model_that_changed_after_its_training_is_no_version(made: tuple[Store, Version], tmp_path: Path):
    job = tmp_path / "job"
    shutil.copytree(made[0].job("h"), job)
    assert whole_model(job) == job / "model"
    with (job / "model" / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\7")
    with pytest.raises(TrainingError, match=r"not those that the training left.*Delete .*result.json and materialise"):
        whole_model(job)


def test_another_seed_is_seen(made: tuple[Store, Version], tmp_path: Path):
    store, version = made
    shutil.copytree(version.path, tmp_path / "other")
    spec = read_json(tmp_path / "other" / "spec.json")
    write_json(tmp_path / "other" / "spec.json", {**spec, "seed": 8})
    again = reproduce(store, Version(**{**vars(version), "path": str(tmp_path / "other")}), launch)
    assert not again.identical
    assert again.farthest > 0


def test_what_cannot_be_made_again_says_why(made: tuple[Store, Version], tmp_path: Path):
    store, version = made
    with pytest.raises(DataError, match="no longer in"):
        reproduce(store, Version(**{**vars(version), "dataset_fingerprint": "gone"}), launch)
    write_json(
        store.dataset("dental", "erased") / "tombstone.json",
        {"fingerprint": "erased", "rewritten_as": "f", "erased_at": "2026-01-02T00:00:00"},
    )
    with pytest.raises(DataError, match="a person was erased from it on 2026-01-02"):
        reproduce(store, Version(**{**vars(version), "dataset_fingerprint": "erased"}), launch)
    config = Path(version.base_model) / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "note": 1}))
    with pytest.raises(ModelUnavailable, match="is not the one"):
        reproduce(store, version, launch)
    config.write_text(before)
    shutil.copytree(version.path, tmp_path / "pretrained")
    spec = read_json(tmp_path / "pretrained" / "spec.json")
    write_json(tmp_path / "pretrained" / "spec.json", {**spec, "text": str(tmp_path / "text"), "text_sha256": "0"})
    pretrained = Version(**{**vars(version), "path": str(tmp_path / "pretrained")})
    with pytest.raises(DataError, match="text, is gone"):
        reproduce(store, pretrained, launch)
    (tmp_path / "text").mkdir()
    with pytest.raises(DataError, match="are not those that v1-abc was trained on"):
        reproduce(store, pretrained, launch)


def test_a_model_of_the_hub_is_loaded_by_the_commit_that_was_trained_on(
    made: tuple[Store, Version], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever has been committed since."""
    store, version = made
    shutil.copytree(version.path, tmp_path / "version")
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(version.base_model, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(base_model, "revision", lambda _: "b" * 40)
    spec = read_json(tmp_path / "version" / "spec.json")
    spec |= {"base_model": "org/tiny", "base_model_identity": {"id": "org/tiny", "revision": "a" * 40}}
    write_json(tmp_path / "version" / "spec.json", spec)
    again = reproduce(store, Version(**{**vars(version), "path": str(tmp_path / "version")}), launch)
    assert again.farthest == 0


def test_an_adapter_finds_its_base_from_anywhere(made: tuple[Store, Version], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The shipped base is named from the project's root."""
    from peft import AutoPeftModelForCausalLM

    store, version = made
    shutil.copytree(version.path, tmp_path / "version")
    config = tmp_path / "version" / "adapter" / base_model.ADAPTER
    write_json(config, {**read_json(config), "base_model_name_or_path": "base"})
    monkeypatch.setattr(base_model, "ROOT", store.home)
    monkeypatch.chdir(tmp_path)
    folder = export(Version(**{**vars(version), "path": str(tmp_path / "version")}), tmp_path / "alone", adapter=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's calls of what transformers deprecates
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[7, 80, 11, 200, 33, 41]])
    torch.testing.assert_close(loaded(ids).logits, models.load_model(version.path)(ids).logits, atol=1e-4, rtol=1e-4)


def test_an_export_loads_anywhere(made: tuple[Store, Version], tmp_path: Path):
    _, version = made
    folder = export(version, tmp_path / "whole")
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert not (folder / "spec.json").exists()
    with pytest.raises(DataError, match="not empty"):
        export(version, tmp_path / "whole")
    alone = export(version, tmp_path / "adapter", adapter=True)
    ids = torch.tensor([[7, 80, 11, 200, 33, 41]])
    kept, whole = models.load_model(version.path)(ids).logits, AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    beside = models.attach(models.load_model(version.base_model), alone)(ids).logits
    torch.testing.assert_close(whole, kept)
    torch.testing.assert_close(beside, kept, atol=1e-4, rtol=1e-4)  # the adapter was added to the weights in another order
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(version.base_model)(ids).logits, kept, atol=1e-3)
    assert (alone / "adapter_model.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size
