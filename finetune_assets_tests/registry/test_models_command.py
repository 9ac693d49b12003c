"""`finetune models`: what a person sees of versions, one of them, and two side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from finetune_assets.cli import main
from finetune_assets.registry.tables import versions
from finetune_assets_tests.serving.shop import Shop


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    made = Shop(tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def models(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


def benchmarked(shop: Shop, letter: str, verdict: str, accuracy: float, rows: int) -> str:
    """A version with the report and the data set that it names."""
    version = shop.version(letter, verdict=verdict)
    folder = shop.home / "reports" / "aurora" / version
    folder.mkdir(parents=True)
    intervals = {"accuracy": {"value": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}, "canaries": None}
    base: dict[str, Any] = {"accuracy": {"value": 0.25, "low": 0.125, "high": 0.375}}
    (folder / "report.json").write_text(json.dumps({"candidates": {"tuned": intervals, "base": base}}))
    dataset = shop.home / "datasets" / "aurora" / letter
    dataset.mkdir(parents=True)
    counts = {"split": {"train": rows, "test": 20}, "intent": {"scheduling": rows + 20}}
    (dataset / "manifest.json").write_text(json.dumps({"counts": counts}))
    with shop.ledger() as book, book.engine.begin() as connection:
        changed = {"report": str(folder / "report.html"), "dataset_fingerprint": letter, "reasons": ["better than the base"]}
        connection.execute(sa.update(versions).where(versions.c.version == version).values(changed))
    return version


def test_versions_are_listed_shown_and_compared(shop: Shop) -> None:
    first = benchmarked(shop, "a", "serve", 0.5, 1100)
    second = benchmarked(shop, "b", "do_not_serve", 0.75, 1200)
    shop.roll_out(first, "10")
    listed = models("list").output
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [["aurora", second], ["aurora", first]]
    assert "candidate, 10 %" in listed
    shown = models("show", "aurora", first).output
    assert shown.startswith(f"aurora {first}: serve, candidate, 10 %\n  better than the base\n")
    assert "data set  a: 1,100 train, 20 test" in shown
    assert "intents   1,120 scheduling" in shown
    [row] = [line.split("  ") for line in shown.splitlines() if line.startswith("accuracy")]
    assert [cell.strip() for cell in row if cell.strip()] == ["accuracy", "0.5 [0.4, 0.6]", "0.25 [0.125, 0.375]"]
    assert "advanced to 10: test (test)" in shown
    compared = {line.split()[0]: line for line in models("diff", "aurora", first, second).output.splitlines()}
    told = {"verdict", "dataset", "tuned.accuracy", "rows.train", "intent.scheduling"}
    assert set(compared) - {"created_at", "seconds"} == {first, *told}
    assert compared["tuned.accuracy"].rstrip().endswith(" +0.25")
    assert "0.75 [0.65, 0.85]" in compared["tuned.accuracy"]
    assert compared["rows.train"].split() == ["rows.train", "1100", "1200", "+100"]
    assert json.loads(models("diff", "aurora", first, second, "--json").output)["rows.train"] == [1100, 1200]


def test_what_is_not_there_is_said(shop: Shop) -> None:
    assert models("list", "--assistant", "sol").output == "sol has no version yet; one is made by: finetune run --assistant sol\n"
    missing = models("show", "aurora", "v9-00000000")
    assert missing.exit_code == 1
    assert "v9-00000000 of aurora is not in the ledger" in missing.output
    unmeasured = models("show", "aurora", shop.version("c", verdict="cannot_tell"))
    assert unmeasured.exit_code == 0
    assert "cannot tell" in unmeasured.output
