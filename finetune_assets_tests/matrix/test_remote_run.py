"""A rented trainer as a user meets it: submitted, waited for, reported, seen by the doctor, and left for a local one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.environment import ROOT
from finetune_assets_tests.tiny_model import make_tiny_model
from finetune_assets_tests.training import fake_provider
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.fake_provider.process import KEY
from finetune_assets_tests.training.remote_request import END, own_days

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SETTINGS = """
select: {tenant: clinica_aurora}
language: es
trainer: openai
min_examples: 50
hyperparameters: {epochs: 1}
benchmark: {max_rows: 24}
budget: {training_usd: 5, monthly_usd: 20}
remote: {min_model_life_days: 0}
"""


class Machine:
    def __init__(self, folder: Path, url: str) -> None:
        self.home, self.assistants = folder / "home", folder / "assistants"
        self.assistants.mkdir()
        (self.assistants / "aurora.yaml").write_text(SETTINGS)
        own = {"FINETUNE_HOME": str(self.home), "FINETUNE_SOURCE": "data/sample", "FINETUNE_ASSISTANTS": str(self.assistants)}
        rented = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "FINETUNE_TABLES": str(own_days(folder / "tables"))}
        self.environment = {**os.environ, **own, **rented, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def finetune(self, *arguments: str) -> tuple[int, dict[str, Any], str]:
        command = [sys.executable, "-m", "finetune_assets.cli", *arguments, "--json"]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout) if done.stdout.strip() else {}, done.stderr


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeProvider]:
    with fake_provider.start() as running:
        yield running
        assert running.state()["violations"] == []


def test_from_submission_to_the_way_out(fake: FakeProvider, tmp_path: Path) -> None:
    machine = Machine(tmp_path, fake.url)
    yaml = machine.assistants / "aurora.yaml"
    shipped = (ROOT / "finetune_assets" / "assistants" / "dental.yaml").read_text()
    own = "".join(line for line in SETTINGS.strip().splitlines(True) if not line.startswith(("select", "language", "benchmark")))
    yaml.rename(machine.assistants / "dental.yaml").write_text(shipped.replace("benchmark:", "benchmark:\n  max_rows: 24") + own)
    code, submitted, errors = machine.finetune("run", "--assistant", "dental")
    assert (code, submitted["state"]) == (0, "submitted"), errors
    assert submitted["provider_job"] == fake.jobs[0]["id"]
    code, again, errors = machine.finetune("run", "--assistant", "dental")
    assert (code, again["job"], len(fake.jobs)) == (0, submitted["job"], 1), errors

    code, reported, errors = machine.finetune("run", "--assistant", "dental", "--wait")
    assert (code, reported["state"]) == (0, "reported"), errors
    assert len(fake.jobs) == 1
    report = json.loads(Path(reported["report"]).with_suffix(".json").read_text())
    tuned, base = report["candidates"]["tuned"], report["candidates"]["base"]
    assert tuned["bits_per_byte"]["value"] is None
    assert tuned["usd_per_1000"]["value"] > 0
    assert tuned["chrf"]["value"] > base["chrf"]["value"]  # the fake's tuned model answers from the training rows
    assert report["dataset_fingerprint"] == submitted["fingerprint"]

    code, status, _ = machine.finetune("status")
    assert 0 < status["assistants"][0]["spent_this_month_usd"] < 5
    code, found, _ = machine.finetune("doctor", "--as-of", "2098-12-20")
    dying = [one for one in found["findings"] if END in one["text"]]
    assert code == 1
    assert {one["level"] for one in dying} == {"problem"}
    assert any(reported["version"] in one["text"] for one in dying)
    assert all("finetune migrate dental --to local/data/base_model" in one["text"] for one in dying)

    code, migrated, errors = machine.finetune("migrate", "dental", "--to", "local/data/base_model")
    assert (code, migrated["state"]) == (0, "reported"), errors
    assert migrated["fingerprint"] == submitted["fingerprint"]
    both = json.loads(Path(migrated["report"]).with_suffix(".json").read_text())
    assert both["candidates"]["tuned"]["bits_per_byte"]["value"] is not None
    assert both["candidates"]["champion"]["chrf"]["value"] == pytest.approx(tuned["chrf"]["value"])
    assert both["candidates"]["tuned"]["bits_per_byte"]["high"] < both["candidates"]["base"]["bits_per_byte"]["low"]
    assert "tuned_vs_champion" in both["differences"]
    assert len(fake.jobs) == 1


def test_what_the_old_model_says_is_learnt_by_a_local_one(fake: FakeProvider, tmp_path: Path) -> None:
    machine = Machine(tmp_path, fake.url)
    code, reported, errors = machine.finetune("run", "--assistant", "aurora", "--wait")
    assert (code, reported["state"]) == (0, "reported"), errors
    jobs, small = len(fake.jobs), make_tiny_model(tmp_path / "small")
    _, before, _ = machine.finetune("status")
    code, distilled, errors = machine.finetune("distil", "aurora", "--to", f"local/{small}", "--max-usd", "1")
    assert (code, distilled["state"]) == (0, "reported"), errors
    assert len(fake.jobs) == jobs
    assert distilled["fingerprint"] != reported["fingerprint"]
    manifest = json.loads((machine.home / "datasets" / "aurora" / distilled["fingerprint"] / "manifest.json").read_text())
    assert manifest["distilled"]["name"] == reported["version"]
    assert manifest["distilled"]["learnt"]["asked"] > 50
    parity = json.loads((Path(distilled["report"]).parent / "parity.json").read_text())
    assert parity["rows"] == 24
    assert parity["chrf"]["low"] <= parity["chrf"]["value"] <= parity["chrf"]["high"]
    report = json.loads(Path(distilled["report"]).with_suffix(".json").read_text())
    assert {"tuned", "teacher", "champion"} <= set(report["candidates"])
    _, after, _ = machine.finetune("status")
    assert after["assistants"][0]["spent_this_month_usd"] > before["assistants"][0]["spent_this_month_usd"]


def run_with(fake: FakeProvider, machine: Machine, provider: str, base: str = "open/small-7b", **settings: Any) -> dict[str, Any]:
    """Submitted, waited for, reported; one job more at the fake."""
    variable = {"azure": "AZURE_OPENAI_API_KEY", "nebius": "NEBIUS_API_KEY"}.get(provider, "OPENAI_COMPATIBLE_API_KEY")
    machine.environment = {name: value for name, value in machine.environment.items() if not name.startswith("OPENAI_")}
    machine.environment[variable] = KEY
    lines = [line for line in SETTINGS.strip().splitlines() if not line.startswith(("trainer", "budget", "remote"))]
    remote = json.dumps({"min_model_life_days": 0, "base_url": fake.url, **settings})
    yaml = "\n".join([*lines, f"trainer: {provider}", f"base_model: {base}", f"remote: {remote}"])
    (machine.assistants / "aurora.yaml").write_text(yaml + "\n")
    before = len(fake.jobs)
    code, submitted, errors = machine.finetune("run", "--assistant", "aurora")
    assert (code, submitted["state"]) == (0, "submitted"), errors
    code, reported, errors = machine.finetune("run", "--assistant", "aurora", "--wait")
    assert (code, reported["state"]) == (0, "reported"), errors
    assert len(fake.jobs) == before + 1
    return reported


def downloaded(cache: Path, name: str) -> Path:
    """The hub's cache, in which our own base model stands as the model of that name."""
    folder, revision = cache / f"models--{name.replace('/', '--')}", "a" * 40
    shutil.copytree(ROOT / "data" / "base_model", folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return cache


@pytest.mark.parametrize("provider", ["azure", "nebius", "openai_compatible"])
def test_the_whole_graph_with_each_copy_of_the_wire(fake: FakeProvider, tmp_path: Path, provider: str) -> None:
    machine = Machine(tmp_path, fake.url)
    served = {"deploy": True} if provider == "nebius" else {}
    fake.set(bom=provider == "azure", checkpoint=str(make_tiny_model(tmp_path / "tiny")) if served else None)
    try:
        base = "gpt-4.1-mini-2025-04-14" if provider == "azure" else "open/small-7b"
        reported = run_with(fake, machine, provider, base, **served)
    finally:
        fake.set(bom=False, checkpoint=None)
    report = json.loads(Path(reported["report"]).with_suffix(".json").read_text())
    tuned, base_scores = report["candidates"]["tuned"], report["candidates"]["base"]
    assert tuned["bits_per_byte"]["value"] is None
    assert tuned["chrf"]["value"] > base_scores["chrf"]["value"]
    remote = json.loads((machine.home / "models" / "aurora" / reported["version"] / "remote.json").read_text())
    assert (remote["provider"], remote["base_url"]) == (provider, fake.url)


def test_a_checkpoint_that_comes_home_is_measured_here_beside_its_base(fake: FakeProvider, tmp_path: Path) -> None:
    machine = Machine(tmp_path, fake.url)
    machine.environment["HF_HUB_CACHE"] = str(downloaded(tmp_path / "hub", "open/small-7b"))
    fake.set(checkpoint=str(make_tiny_model(tmp_path / "tiny")))
    try:
        reported = run_with(fake, machine, "nebius")
    finally:
        fake.set(checkpoint=None)
    report = json.loads(Path(reported["report"]).with_suffix(".json").read_text())
    assert all(report["candidates"][name]["bits_per_byte"]["value"] > 0 for name in ("base", "tuned"))  # their weights are here
    version = machine.home / "models" / "aurora" / reported["version"]
    assert (version / "model.safetensors").exists()
    assert not (version / "remote.json").exists()


def test_bad_input_is_named_and_nothing_is_bought(fake: FakeProvider, tmp_path: Path) -> None:
    machine = Machine(tmp_path, fake.url)
    before = len(fake.jobs)
    yaml = machine.assistants / "aurora.yaml"
    for changed, says in (
        ("budget: {training_usd: 0.01}", "above budget.training_usd"),
        ("budget: {monthly_usd: 0.02}", "above budget.monthly_usd"),
        ("remote: {allowed: false, min_model_life_days: 0}", "remote.allowed: false"),
        ("remote: {min_model_life_days: 36500}", f"switches gpt-4o-mini-2024-07-18 off on {END}"),
        ("require_approval: true", "--approve"),
    ):
        key = changed.partition(":")[0]
        lines = [line for line in SETTINGS.strip().splitlines() if not line.startswith(key)]
        yaml.write_text("\n".join([*lines, changed]) + "\n")
        code, _, errors = machine.finetune("run", "--assistant", "aurora")
        assert (code, says in errors) == (1, True), errors
    yaml.write_text(SETTINGS)
    machine.environment["OPENAI_API_KEY"] = "sk-wrong-0123456789"
    code, _, errors = machine.finetune("run", "--assistant", "aurora")
    assert (code, "401" in errors, "sk-wrong" in errors) == (1, True, False), errors
    assert len(fake.jobs) == before
