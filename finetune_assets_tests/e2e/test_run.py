"""`finetune run` as a user starts it: to the report, interrupted by SIGKILL at its worst moments, twice at once, on bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets.environment import ROOT

pytestmark = pytest.mark.timeout(1500)
SHARED = ROOT.parent / "shared" / "data" / "sgd"

SETTINGS = """
select: {tenant: clinica_aurora}
language: es
hyperparameters: {epochs: 1}
benchmark: {max_rows: 24}
min_examples: 50
"""
NOISY = ("seconds", "machine", "made_at", "tokens_per_second", "usd", "plan", "training", "resumed", "reasons", "model")
"""What time, the place of the store or the interruption itself changes in a report; `reasons` tells the waiting time."""


class Machine:
    """A fresh store and one assistant."""

    def __init__(self, folder: Path) -> None:
        self.home, assistants = folder / "home", folder / "assistants"
        assistants.mkdir(parents=True)
        (assistants / "aurora.yaml").write_text(SETTINGS)
        self.environment = {
            **os.environ,
            "FINETUNE_HOME": str(self.home),
            "FINETUNE_SOURCE": "data/sample",
            "FINETUNE_ASSISTANTS": str(assistants),
            "HF_HUB_OFFLINE": "1",
        }

    def start(self, *options: str, assistant: str = "aurora") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "finetune_assets.cli", "run", "--assistant", assistant, "--json", *options]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def run(self, *options: str, assistant: str = "aurora") -> tuple[int, dict[str, Any], str]:
        process = self.start(*options, assistant=assistant)
        output, errors = process.communicate()
        return process.returncode, json.loads(output) if output.strip() else {}, errors

    def numbers(self) -> Any:
        report = json.loads((self.home / "reports" / "aurora" / "latest" / "report.json").read_text())
        report["gates"] = [gate for gate in report["gates"] if gate["name"] != "reply_seconds"]
        return without_noise(report)

    def wait_for(self, pattern: str, process: subprocess.Popen[str], least: int = 1, seconds: float = 300) -> Path:
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            found = sorted(self.home.glob(pattern))
            if len(found) >= least:
                return found[-1]
            time.sleep(0.05)
        raise AssertionError(f"{pattern} did not appear; the run ended with {process.poll()}")


def without_noise(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_noise(v) for k, v in value.items() if k == "model_version" or not any(noise in k for noise in NOISY)}
    return [without_noise(item) for item in value] if isinstance(value, list) else value


def worker_of(home: Path) -> int:
    return int(json.loads(next(home.glob("jobs/*/worker.json")).read_text())["pid"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    machine = Machine(tmp_path_factory.mktemp("whole"))
    code, outcome, errors = machine.run()
    assert code == 0, errors
    assert outcome["verdict"] in ("serve", "do_not_serve", "cannot_tell")
    assert Path(outcome["report"]).exists()
    return machine.numbers()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["trainer", "run", "group"])
def test_a_killed_run_ends_with_the_same_numbers(tmp_path: Path, uninterrupted: Any, victim: str) -> None:
    machine = Machine(tmp_path)
    process = machine.start()
    machine.wait_for("jobs/*/stages/*/checkpoints/checkpoint-*/totals.json", process)
    if victim == "trainer":
        os.kill(worker_of(machine.home), signal.SIGKILL)
    elif victim == "run":
        os.kill(process.pid, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (process.returncode == 0) == (victim == "trainer")  # a worker that dies is started again by itself

    code, outcome, errors = machine.run()
    assert code == 0, errors
    result = json.loads(next(machine.home.glob("jobs/*/result.json")).read_text())
    assert result["resumed"] >= 1
    assert machine.numbers() == uninterrupted
    status = subprocess.run(
        [sys.executable, "-m", "finetune_assets.cli", "status", "--json"],
        cwd=ROOT,
        env=machine.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(status.stdout)["assistants"][0]["version"] == outcome["version"]
    assert not [path for path in machine.home.rglob(".tmp-*") if "dagster" not in path.parts]


@pytest.mark.slow
def test_a_second_run_waits_and_makes_nothing_twice(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    first = machine.start()
    machine.wait_for("run.lock", first)
    time.sleep(3)
    code, outcome, errors = machine.run()
    output, _ = first.communicate()
    assert (code, first.returncode) == (0, 0), errors
    assert "waiting" in errors
    assert outcome["version"] == json.loads(output)["version"]
    assert len(list(machine.home.glob("jobs/*/result.json"))) == 1
    assert len(list((machine.home / "models" / "aurora").glob("v*"))) == 1


@pytest.mark.slow
def test_require_serve_ends_with_three(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    strict = machine.home.parent / "assistants" / "aurora.yaml"
    strict.write_text(SETTINGS + "gates: {max_training_loss: 0.001}\n")
    code, outcome, errors = machine.run("--require", "serve")
    assert (code, outcome["verdict"]) == (3, "do_not_serve"), errors


def test_bad_input_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    machine.environment["FINETUNE_SOURCE"] = str(source)
    code, _, errors = machine.run()
    assert code == 1, errors
    assert str(source) in errors
    for table in ("conversations", "messages"):
        pl.read_parquet(ROOT / "data" / "sample" / f"{table}.parquet").write_parquet(source / f"{table}.parquet")
    code, _, errors = machine.run()
    assert code == 1
    assert "feedback" in errors
    (source / "feedback.parquet").write_bytes((ROOT / "data" / "sample" / "feedback.parquet").read_bytes()[:2000])
    code, _, errors = machine.run()
    assert code == 1
    assert "feedback.parquet" in errors
    assert not list((tmp_path / "home").glob("corpus/*/week=*"))

    machine.environment["FINETUNE_SOURCE"] = "data/sample"
    yaml = tmp_path / "assistants" / "aurora.yaml"
    for text, expected, says in (
        ("select: {tenant: nobody}\n", 1, "nobody"),
        ("select: {tenant: clinica_aurora}\nmin_examples: 100000\n", 1, "min_examples"),
        ("select: {tenant: clinica_aurora}\nlanguag: es\n", 2, "aurora.yaml:2"),
    ):
        yaml.write_text(text)
        code, _, errors = machine.run()
        assert (code, says in errors) == (expected, True), errors
        assert not (tmp_path / "home" / "datasets" / "aurora" / "latest").exists()


def texts_of(file: Path) -> str:
    """Everything a file says, Parquet decoded."""
    if file.suffix == ".parquet":
        return pl.read_parquet(file).write_ndjson() or ""
    return file.read_bytes().decode("utf-8", "replace")


@pytest.mark.slow
def test_a_real_export_is_trained_and_nothing_personal_is_left(tmp_path: Path) -> None:
    """One short training on real input, for a tenant that has no file of its own and a vertical given only by a YAML file."""
    if not SHARED.is_dir():
        pytest.skip("needs the real export in ../shared/data/sgd")
    machine = Machine(tmp_path)
    machine.environment["FINETUNE_SOURCE"] = str(SHARED)
    (tmp_path / "assistants" / "dental.yaml").write_text(
        "select: {vertical: dental}\nlanguage: en\nhyperparameters: {epochs: 0.2}\nbenchmark: {max_rows: 12}\n"
    )
    (tmp_path / "assistants" / "eating_out.yaml").write_text("select: {vertical: restaurant}\nlanguage: en\n")
    code, outcome, errors = machine.run(assistant="clinic_aurora")
    assert code == 0, errors
    assert outcome["verdict"] in ("serve", "do_not_serve", "cannot_tell")
    manifest = json.loads((machine.home / "datasets" / "clinic_aurora" / "latest" / "manifest.json").read_text())
    assert list(manifest["counts"]["tenant"]) == ["clinic_aurora"]
    code, outcome, errors = machine.run("--until", "jsonl_splits", assistant="eating_out")
    assert (code, outcome["state"]) == (0, "stopped"), errors

    truth = json.loads((SHARED / "truth.json").read_text())
    values = {entry["value"] for entry in truth["pii"]}
    files = [file for file in machine.home.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    assert len(files) > 50
    found = {(file.name, value) for file in files for text in [texts_of(file)] for value in values if value in text}
    assert not found
    rejected = pl.concat([pl.read_parquet(file) for file in machine.home.glob("corpus/rejected/*/*.parquet")])
    assert {(row["table"], row["id"]) for row in truth["bad_rows"]} <= set(rejected.select("table", "id").rows())
