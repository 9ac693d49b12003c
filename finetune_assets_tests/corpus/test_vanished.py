"""A source that shrinks by much stops the reading before anything is changed; by little, it is told what goes."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets.assets.corpus import raw_conversations
from finetune_assets.automation.retrain import stale_range
from finetune_assets.corpus.erasure import Erased, conversation_subject, user_subject
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.errors import SettingsError, SourceError
from finetune_assets.resources import LedgerResource, SourceResource, StoreResource
from finetune_assets.storage import Store
from finetune_assets_tests.corpus.exports import (
    KEY,
    Row,
    at,
    conversation,
    everything_under,
    judgement,
    message,
    write_table,
)
from finetune_assets_tests.resources import weeks

EACH = 20
WEEKS = ("2026-09-07", "2026-09-14", "2026-09-21", "2026-09-28", "2026-10-05", "2026-10-12")


def export(folder: Path, numbers_of_weeks: range, tenant: str = "clinic_a", **given: Any) -> Path:
    """A file a week and table: EACH conversations of two messages, the first of them judged."""
    shutil.rmtree(folder, ignore_errors=True)
    first = 0 if tenant == "clinic_a" else 5_000
    for week in numbers_of_weeks:
        numbers = range(first + week * EACH, first + (week + 1) * EACH)
        own = {"tenant_id": tenant, **given}
        rows: dict[str, list[Row]] = {
            "conversations": [conversation(n, started_at=at(week, n / 10), ended_at=None, **own) for n in numbers],
            "messages": [message(2 * n + k, n, created_at=at(week, n / 10 + k)) for n in numbers for k in range(2)],
            "feedback": [judgement(week, 2 * numbers[0] + 1, numbers[0], created_at=at(week, 90), tenant_id=tenant)],
        }
        for table, own_rows in rows.items():
            (folder / table).mkdir(parents=True, exist_ok=True)
            write_table(folder / table / f"{week}.jsonl", table, own_rows)
    return folder


def update(store: Store, source: SourceTables) -> list[str]:
    stale = stale_weeks(store, source).stale
    ingest_conversations(store, source, stale, KEY)
    ingest_feedback(store, source, stale, KEY)
    return stale


def stored(store: Store) -> int:
    return sum(pl.read_parquet(path).height for path in (store.home / "corpus" / "conversations").glob("*/part.parquet"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Six weeks, 120 conversations."""
    store = Store(tmp_path / "home")
    update(store, read_source([str(export(tmp_path / "source", range(6)))]))
    assert stored(store) == 6 * EACH
    return store


def test_an_export_of_the_newest_weeks_only_changes_nothing_until_it_is_meant(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything_under(store.home)
    folder = export(tmp_path / "source", range(4, 6))
    for _ in range(2):  # of a run that was repeated, too
        with pytest.raises(SourceError) as stopped:
            stale_weeks(store, read_source([str(folder)]))
        assert "80 of 120 stored conversations" in str(stopped.value)
        assert "4 weeks, 2026-09-07 to 2026-09-28" in str(stopped.value)
        assert "FINETUNE_MAX_VANISHED=1" in str(stopped.value)
    with pytest.raises(SourceError, match="80 of 120"):  # one partition of the UI
        ingest_conversations(store, read_source([str(folder)]), [WEEKS[5]], KEY)
    assert everything_under(store.home) == before
    monkeypatch.setenv("FINETUNE_MAX_VANISHED", "0.7")
    source = read_source([str(folder)])
    assert stale_weeks(store, source).gone == dict.fromkeys(WEEKS[:4], EACH)
    counts = ingest_conversations(store, source, list(WEEKS), KEY)
    assert {week: numbers.get("vanished", 0) for week, numbers in counts.items()} == dict.fromkeys(WEEKS[:4], EACH) | {
        WEEKS[4]: 0,
        WEEKS[5]: 0,
    }
    assert stored(store) == 2 * EACH


def test_little_goes_without_a_stop_and_is_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_source([str(export(tmp_path / "source", range(3, 6)))])  # half is not more than half
    stale = stale_weeks(store, source)
    assert stale.gone == dict.fromkeys(WEEKS[:3], EACH)
    monkeypatch.setenv("FINETUNE_MAX_VANISHED", "0")
    ingest_conversations(store, source, stale.stale, KEY)  # it was allowed when it was looked at
    assert stored(store) == 3 * EACH
    update(store, read_source([str(export(tmp_path / "source", range(5, 6)))]))  # 40 are fewer than 50, whatever the share
    assert stored(store) == EACH


def test_an_address_that_falls_off_is_seen_in_weeks_that_stay(store: Store, tmp_path: Path) -> None:
    other = str(export(tmp_path / "other", range(6), "clinic_b", satisfaction_score=4))
    update(store, read_source([str(tmp_path / "source"), other]))
    stale = stale_weeks(store, read_source([other]))  # half: told
    assert sum(stale.gone.values()) == 6 * EACH
    shutil.rmtree(store.home)
    more = str(export(tmp_path / "more", range(6, 8), "clinic_a"))
    update(store, read_source([str(tmp_path / "source"), more, other]))
    with pytest.raises(SourceError, match=r"160 of 280 stored .* 8 weeks.* FINETUNE_SOURCE"):
        stale_weeks(store, read_source([other]))


def test_conversations_that_lost_their_messages_would_go_as_well(store: Store, tmp_path: Path) -> None:
    for week in range(4):
        (tmp_path / "source" / "messages" / f"{week}.jsonl").unlink()
    with pytest.raises(SourceError, match="80 of 120"):
        stale_weeks(store, read_source([str(tmp_path / "source")]))


def test_an_index_that_is_made_anew_does_not_forget_what_is_stored(store: Store, tmp_path: Path) -> None:
    (store.home / "corpus" / "index" / "parts.json").unlink()
    with pytest.raises(SourceError, match="80 of 120"):
        stale_weeks(store, read_source([str(export(tmp_path / "source", range(4, 6)))]))


def test_ids_that_are_stored_as_hashes_count(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "home"), export(tmp_path / "source", range(6))
    for table in ("conversations", "messages", "feedback"):
        for path in (folder / table).glob("*.jsonl"):
            path.write_text(path.read_text().replace('"conv_', '"+5917012'))
    update(store, read_source([str(folder)]))
    ids = pl.read_parquet(store.corpus("conversations", WEEKS[0]) / "part.parquet")["conversation_id"]
    assert ids.str.starts_with("p_").all()
    assert stale_weeks(store, read_source([str(folder)])).gone == {}
    for table in ("conversations", "messages", "feedback"):
        for week in range(4):
            (folder / table / f"{week}.jsonl").unlink()
    with pytest.raises(SourceError, match=r"80 of 120 .* 4 weeks"):
        stale_weeks(store, read_source([str(folder)]))


def test_rows_of_erased_people_do_not_count(store: Store, tmp_path: Path) -> None:
    users = {user_subject(f"user_{n:04d}", KEY) for n in range(2 * EACH)}
    talks = {conversation_subject(f"conv_{n:04d}", KEY) for n in range(2 * EACH, 3 * EACH)}
    folder = export(tmp_path / "source", range(3, 6))
    (folder / "conversations" / "5.jsonl").write_text("")
    (folder / "messages" / "5.jsonl").write_text("")
    with pytest.raises(SourceError, match="80 of 120"):
        stale_weeks(store, read_source([str(folder)]))
    stale = stale_weeks(store, Erased(frozenset(users | talks), KEY).leave_out(read_source([str(folder)])))
    assert stale.gone == {WEEKS[5]: EACH}


@pytest.mark.parametrize("value", ["1.5", "-1", "half"])
def test_a_share_is_between_0_and_1(value: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_MAX_VANISHED", value)
    with pytest.raises(SettingsError, match=r"FINETUNE_MAX_VANISHED=.*0"):
        stale_weeks(store, read_source([str(tmp_path / "source")]))


@pytest.mark.filterwarnings("ignore:AssetExecutionContext.:DeprecationWarning")  # inside Dagster
def test_workers_of_a_run_and_the_schedule_stop_too_and_the_log_says_what_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_USER_KEY", "one key")
    home, folder = tmp_path / "home", tmp_path / "source"
    assert weeks.build(home, export(folder, range(5)), [raw_conversations])[0].success
    before = everything_under(home / "corpus")
    export(folder, range(3, 5))
    monkeypatch.setenv("FINETUNE_WEEK_WORKERS", "2")
    done, _ = weeks.build(home, folder, [raw_conversations])
    assert "60 of 100 stored conversations" in str(done.get_step_failure_events()[0].step_failure_data.error)
    own = SourceResource(urls=[str(folder)]), StoreResource(home=str(home)), LedgerResource(url=f"sqlite:///{home}.db")
    with pytest.raises(SourceError, match="60 of 100"):
        stale_range(*own, datetime.date(2026, 10, 20))
    assert everything_under(home / "corpus") == before
    monkeypatch.setenv("FINETUNE_MAX_VANISHED", "1")
    done, log = weeks.build(home, folder, [raw_conversations])
    assert done.success
    assert [line for line in log if "went from the store" in line] == [
        f"{EACH} stored conversations of week {week} are no longer in the source, and went from the store." for week in WEEKS[:3]
    ]


def test_other_data_at_wholly_other_addresses_take_the_place(tmp_path: Path):
    store = Store(tmp_path / "home")
    update(store, read_source([str(export(tmp_path / "sample", range(6)))]))
    own = read_source([str(export(tmp_path / "own", range(2), tenant="clinic_b"))])
    assert sum(stale_weeks(store, own).gone.values()) == 6 * EACH
    update(store, own)
    assert stored(store) == 2 * EACH
