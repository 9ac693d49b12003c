"""`finetune run`: what is refused before anything is made, and what it says of a source that is mostly dropped."""

from __future__ import annotations

import datetime
from pathlib import Path

import dagster as dg
import pytest

from finetune_assets.automation.local_run import Request, run
from finetune_assets.errors import DataError, ModelUnavailable, SourceError
from finetune_assets.resources.tags import MIGRATE_TO
from finetune_assets.training import lifecycle
from finetune_assets_tests.code_location import DEFINITIONS
from finetune_assets_tests.corpus.exports import Row, export, write


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


def store_of(folder: Path, tables: dict[str, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh store, an assistant of clinic_a, and a source."""
    for made in (folder / "assistants", folder / "dagster"):
        made.mkdir(parents=True)
    (folder / "assistants" / "a.yaml").write_text("select: {tenant: clinic_a}\n")
    (folder / "dagster" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    source = write(folder / "source", tables, ".jsonl")
    for name, value in (("HOME", folder / "home"), ("ASSISTANTS", folder / "assistants"), ("SOURCE", source)):
        monkeypatch.setenv(f"FINETUNE_{name}", str(value))
    monkeypatch.setenv("FINETUNE_DATABASE_URL", f"sqlite:///{folder / 'ledger.db'}")
    monkeypatch.setenv("DAGSTER_HOME", str(folder / "dagster"))


def test_a_run_says_what_it_dropped_of_each_table_and_the_checks_show_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = export(30)
    for row in tables["messages"][1::2]:
        row["role"] = "bot"
    tables["feedback"] = tables["feedback"][:19]  # all of them are dropped, but they are few
    store_of(tmp_path, tables, monkeypatch)
    said: list[str] = []
    run(Request("a", until="rlhf_feedback"), DEFINITIONS, said.append, {})
    folder = tmp_path / "home" / "corpus" / "rejected"
    line = f"60 of 120 messages read (50%) were dropped: role_unknown 60. See {folder}, finetune explain msg_0001."
    assert said[1:] == [line]
    with dg.DagsterInstance.get() as instance:
        (last,) = instance.get_runs(limit=1)
        found = {
            one.check_name: one
            for record in instance.get_records_for_run(last.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
            if (event := record.event_log_entry.dagster_event) is not None and (one := event.asset_check_evaluation_data)
        }
    messages, feedback = found["conversations_mostly_kept"], found["feedback_mostly_kept"]
    assert (messages.passed, messages.blocking, messages.description) == (False, False, line)
    assert feedback.passed


def test_a_source_without_any_usable_time_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = export(2)
    for row in (row for rows in tables.values() for row in rows):
        row.update({name: value.replace(tzinfo=None) for name, value in row.items() if isinstance(value, datetime.datetime)})
    store_of(tmp_path, tables, monkeypatch)
    told = r"(?s)No row.*usable time.*2 of 2 conversations.*time_naive 2.*8 of 8 messages.*time_naive 8"
    with pytest.raises(DataError, match=told):
        run(Request("a"), DEFINITIONS, lambda _: None, {})
