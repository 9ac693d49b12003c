"""`finetune check` on a real version, in a child process as it is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune_assets.cli import main
from finetune_assets.evaluation import checking
from finetune_assets.evaluation.suite import Outcome
from finetune_assets.registry import Ledger
from finetune_assets.storage import write_json
from finetune_assets_tests.tiny_model import make_tiny_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assistants = tmp_path / "assistants"
    assistants.mkdir()
    (assistants / "dental.yaml").write_text("select: {vertical: dental}\nbenchmark: {max_new_tokens: 8}\n")
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("FINETUNE_ASSISTANTS", str(assistants))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_without_a_suite_it_says_what_to_do(home: Path):
    found = CliRunner().invoke(main, ["check", "--assistant", "dental"])
    assert found.exit_code == 2
    assert "benchmark.checks" in found.stderr


def test_a_judges_word_is_told_and_fails_nothing(monkeypatch: pytest.MonkeyPatch):
    told = [Outcome("greets", False, "judge: not so: greets", "Hm.", judged=True), Outcome("closed", True, "", "Cerramos.")]
    monkeypatch.setattr(checking, "check_version", lambda *_: ("v1", told))
    found = CliRunner().invoke(main, ["check", "--assistant", "dental"])
    assert found.exit_code == 0
    assert "judge: no   greets" in found.stdout
    assert "1 passed, 0 failed, 0 skipped, 0 of 1 hold by the judging model" in found.stdout


@pytest.mark.slow
def test_cases_pass_and_fail(home: Path):
    ledger = Ledger(f"sqlite:///{home / 'store' / 'ledger.db'}")
    job = {"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": "f", "provider": "local"}
    opened = ledger.open_job({**job, "base_model": "b", "hyperparameters": {}, "plan": {}, "spec_hash": "s"})
    version = ledger.mint_version(opened, "c" * 64, home / "store" / "models" / "dental")
    ledger.close()
    make_tiny_model(Path(version.path))
    suite = home / "suite"
    suite.mkdir()
    write_json(suite / "empty.json", {})
    (suite / "cases.jsonl").write_text(
        json.dumps({"name": "no promise", "prompt": "hola", "not_contains": "garantizo"})
        + "\n"
        + json.dumps({"name": "says this", "prompt": "hola", "contains": "quetzalcóatl"})
        + "\n"
        + json.dumps({"name": "calls nothing", "prompt": "hola", "tools": {"name": "book"}, "calls": []})
        + "\n"
        + json.dumps({"name": "books", "prompt": "hola", "tools": {"name": "book"}, "calls": {"name": "book"}})
        + "\n"
    )
    found = CliRunner().invoke(main, ["check", "--assistant", "dental", "--suite", str(suite), "--json"])
    assert found.exit_code == 1
    told = json.loads(found.stdout)
    assert told["failed"] == 2
    assert [case["passed"] for case in told["cases"]] == [True, False, True, False]
    assert told["cases"][3]["why"] == "calls: nothing, not book({})"
