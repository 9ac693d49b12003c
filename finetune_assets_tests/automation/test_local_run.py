"""`finetune run`: what is refused before anything is made."""

from __future__ import annotations

import datetime
from pathlib import Path

import dagster as dg
import pytest

from finetune_assets.automation.local_run import Request, run
from finetune_assets.errors import ModelUnavailable, SourceError
from finetune_assets.resources.tags import MIGRATE_TO
from finetune_assets.training import lifecycle


def test_a_model_that_ends_soon_is_refused_before_the_corpus_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, nothing = tmp_path / "assistants", tmp_path / "nothing"
    for made in (folder, tmp_path / "dagster"):
        made.mkdir()
    for name, value in (("HOME", tmp_path / "home"), ("ASSISTANTS", folder), ("SOURCE", nothing)):
        monkeypatch.setenv(f"FINETUNE_{name}", str(value))
    monkeypatch.setenv("FINETUNE_DATABASE_URL", f"sqlite:///{tmp_path / 'ledger.db'}")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    (tmp_path / "dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 11, 22))
    yaml, settings = folder / "dental.yaml", "select: {vertical: dental}\ntrainer: openai\n"
    yaml.write_text(settings)

    def go(**asked: object) -> None:
        run(Request("dental", **asked), dg.Definitions(), lambda _: None, {})  # pyright: ignore[reportArgumentType]

    with pytest.raises(ModelUnavailable, match=r"in 53 days.*Or lower remote\.min_model_life_days to 53"):
        go()
    with pytest.raises(SourceError, match="nothing"):  # a data set needs no model
        go(until="jsonl_splits")
    yaml.write_text("select: {vertical: dental}\n")
    with pytest.raises(ModelUnavailable, match="in 53 days"):
        go(tags={MIGRATE_TO: "openai/gpt-4.1-2025-04-14"})
    yaml.write_text(f"{settings}remote: {{min_model_life_days: 53}}\n")
    with pytest.raises(SourceError, match="nothing"):
        go()
