"""A feed that stops or doubles is seen, chance is not, and neither is the end of an export."""

from __future__ import annotations

import datetime as dt
import sqlite3
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import read_source
from finetune_assets.corpus.watch import (
    TIMES,
    WEEK,
    end_of_export,
    feeds,
    judge,
    recent_rows,
    watch,
    watch_freshness,
    watch_volume,
)
from finetune_assets.storage import Store, write_parquet
from finetune_assets_tests.corpus.exports import KEY, START, Row, at, conversation, judgement, message, write

MONDAY = dt.datetime(2026, 9, 7, tzinfo=dt.UTC)
DAYS = dt.timedelta(days=1)
counts = st.lists(st.integers(0, 300), min_size=6, max_size=12)


@given(counts, st.integers(0, 900), st.randoms(use_true_random=False))
def test_a_verdict_depends_on_no_order_and_is_monotone(past: list[int], now: int, draw: object) -> None:
    found = judge(past, now)
    assert found == judge(sorted(past), now)
    if found is None:
        return
    usual = np.median(past)
    if found[0] == "rose":
        assert now >= 1.75 * usual
        more = judge(past, now + 1)
        assert more is not None
        assert more[0] == "rose"
    else:
        assert now <= usual / 2
        assert (found[0] == "stopped") == (now == 0)
        assert judge(past, max(0, now - 1)) is not None


@given(st.integers(0, 500), st.integers(6, 12))
def test_the_same_as_ever_is_never_a_finding(usual: int, weeks: int) -> None:
    assert judge([usual] * weeks, usual) is None


def test_chance_is_rarely_a_finding_and_a_stop_or_a_double_mostly_is() -> None:
    draw = np.random.default_rng(1)
    for usual in (2, 8, 30, 200):
        past = draw.poisson(usual, (2_000, 8))
        false = sum(judge(row.tolist(), int(now)) is not None for row, now in zip(past, draw.poisson(usual, 2_000), strict=True))
        assert false <= 2, usual
        if usual >= 30:
            assert all(judge(row.tolist(), 0) is not None for row in past[:500])
            doubled = [
                judge(row.tolist(), int(now)) is not None for row, now in zip(past, draw.poisson(2.2 * usual, 500), strict=False)
            ]
            assert float(np.mean(doubled)) > (0.7 if usual == 30 else 0.99)


def feed(per_week: dict[str, list[int]], seed: int = 1) -> pl.DataFrame:
    """Rows of each tenant, so many in each week from MONDAY on, at random times."""
    draw = np.random.default_rng(seed)
    rows = [
        (tenant, MONDAY + n * WEEK + float(share) * WEEK)
        for tenant, weeks in per_week.items()
        for n, number in enumerate(weeks)
        for share in draw.random(number)
    ]
    return pl.DataFrame(rows, schema={"tenant_id": pl.String, "at": pl.Datetime("us", "UTC")}, orient="row")


def found(rows: pl.DataFrame, as_of: dt.datetime | None = None) -> set[tuple[str, str, str]]:
    return {(one.tenant, one.what, one.week) for one in watch_volume(rows, as_of).findings}


def test_one_tenant_that_stops_doubles_or_is_new() -> None:
    rows = feed(
        {"steady": [40] * 10, "gone": [40] * 9 + [0], "twice": [40] * 9 + [95], "small": [2] * 9 + [0], "new": [0] * 7 + [40] * 3}
    )
    end = MONDAY + 10 * WEEK - dt.timedelta(minutes=1)
    week = (MONDAY + 9 * WEEK).date().isoformat()
    assert found(rows, end) == {("gone", "stopped", week), ("twice", "rose", week)}
    assert watch_volume(rows, end).judged == 4
    late = watch_freshness(rows, end)
    assert [one.tenant for one in late.findings] == ["gone"]
    assert "no row for" in late.findings[0].sentence


@pytest.mark.parametrize("hours", [5, 30, 80, 160])
def test_a_running_week_is_compared_with_as_much_of_the_others(hours: int) -> None:
    rows = feed({"a": [60] * 10, "b": [25] * 10})
    now = MONDAY + 9 * WEEK + dt.timedelta(hours=hours)
    assert found(rows.filter(pl.col("at") <= now), now) == set()


def test_the_end_of_an_export_is_no_stop_but_a_database_that_falls_silent_is(tmp_path: Path) -> None:
    rows = feed({"a": [60] * 9 + [1], "b": [25] * 9 + [0]})
    assert found(rows) == set()
    assert not watch_freshness(rows).findings
    silent = MONDAY + 10 * WEEK
    assert {tenant for tenant, _, _ in found(rows, silent)} == {"a", "b"}
    assert {one.tenant for one in watch_freshness(rows, silent + 2 * WEEK).findings} == {"b", "a"}
    database = "postgresql://u@h/d"
    (tmp_path / "source.yaml").write_text("files: '*.jsonl'\n", encoding="utf-8")
    assert feeds([database, "data/sample", str(tmp_path)]) == ([database], ["data/sample"])


def test_one_of_two_tenants_that_stops_is_no_end_of_the_export() -> None:
    for weeks in (1, 2, 3):
        rows = feed({"a": [30] * 12, "b": [50] * (12 - weeks) + [0] * weeks})
        assert ("b", "stopped", (MONDAY + 11 * WEEK).date().isoformat()) in found(rows)
        assert {one.tenant for one in watch_freshness(rows).findings} == {"b"}


def test_a_single_tenant_that_falls_to_a_tenth_is_found_and_stragglers_are_not() -> None:
    weeks = [(MONDAY + n * WEEK).date().isoformat() for n in range(12)]
    assert found(feed({"a": [80] * 11 + [8]})) == {("a", "fell", weeks[11])}
    assert found(feed({"a": [80] * 10 + [8, 8]})) == {("a", "fell", weeks[10]), ("a", "fell", weeks[11])}
    for stragglers in ([3], [2, 1], [2, 0, 1]):
        assert found(feed({"a": [80] * 10 + stragglers})) == set()


def stored(store: Store, table: str, rows: pl.DataFrame) -> None:
    """Rows of `feed` as stored weeks."""
    name, time = {"conversations": ("conversation_id", "started_at"), "feedback": ("feedback_id", "created_at")}[table]
    rows = rows.with_columns(pl.lit("conversation").alias("kind"), pl.lit("x").alias(name), week=pl.col("at").dt.truncate("1w"))
    for (week,), own in rows.rename({"at": time}).partition_by("week", as_dict=True).items():
        write_parquet(store.corpus(table, f"{week:%Y-%m-%d}") / "part.parquet", own)


def test_feedback_of_a_folder_is_compared_with_the_newest_conversation(tmp_path: Path) -> None:
    store, now = Store(tmp_path), MONDAY + 60 * WEEK
    stored(store, "conversations", feed({"a": [60] * 12, "b": [40] * 12}))
    stored(store, "feedback", feed({"a": [30] * 10, "b": [30] * 12}, seed=2))
    both = [watch(store, "feedback", ["data/sample"], now, one).findings for one in (watch_volume, watch_freshness)]
    assert [{(one.tenant, one.what) for one in own} for own in both] == [{("a", "stopped")}, {("a", "late")}]
    assert not watch(store, "conversations", ["data/sample"], now, watch_volume).findings
    for path in (store.home / "corpus" / "feedback").glob("*/part.parquet"):
        if path.parent.name >= f"week={MONDAY + 9 * WEEK:%Y-%m-%d}":
            path.unlink()  # nobody's feedback comes any more
    assert len(watch(store, "feedback", ["data/sample"], now, watch_volume).findings) == 4


def test_a_database_beside_a_folder_is_compared_with_the_clock(tmp_path: Path) -> None:
    store, url = Store(tmp_path / "home"), f"sqlite:///{tmp_path / 'chat.db'}"
    folder = write(tmp_path / "export", tables("old", 0))
    live = tables("live", 500)
    with sqlite3.connect(tmp_path / "chat.db") as connection:
        for table, rows in live.items():
            connection.execute(f"CREATE TABLE {table} ({', '.join(rows[0])})")
            values = [[str(cell) if isinstance(cell, dt.datetime) else cell for cell in row.values()] for row in rows]
            connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", values)
    sources = [str(folder), url]
    source = read_source(sources)
    weeks = stale_weeks(store, source).stale
    ingest_conversations(store, source, weeks, KEY)
    ingest_feedback(store, source, weeks, KEY)
    ended = START + 10 * WEEK
    for table in ("conversations", "feedback"):
        for judged in (watch_volume, watch_freshness):
            assert not watch(store, table, sources, ended, judged).findings
            assert {one.tenant for one in watch(store, table, sources, ended + 2 * WEEK, judged).findings} == {"live"}
            assert not watch(store, table, sources[:1], ended + 2 * WEEK, judged).findings


def tables(tenant: str, first: int) -> dict[str, list[Row]]:
    """Ten weeks of twenty conversations, each of which is judged."""
    made: dict[str, list[Row]] = {"conversations": [], "messages": [], "feedback": []}
    for n in range(first, first + 200):
        when = at(weeks=(n - first) / 20, minutes=3)
        made["conversations"].append(conversation(n, tenant_id=tenant, started_at=when, ended_at=None))
        made["messages"] += [message(2 * n + k, n, created_at=when) for k in range(2)]
        made["feedback"].append(judgement(n, 2 * n + 1, n, tenant_id=tenant, created_at=when))
    return made


@pytest.mark.parametrize("rows", [[], [0], [1], [3, 4], [40, 0]])
def test_too_little_history_is_not_judged(rows: list[int]) -> None:
    watched = watch_volume(feed({"a": rows}))
    assert (watched.findings, watched.judged) == ([], 0)
    assert watch_freshness(feed({"a": rows})).judged == 0


def test_no_false_alarm_in_real_histories_as_they_grow() -> None:
    root = Path(__file__).parents[2]
    for folder in (root / "data" / "sample", root.parent / "shared" / "data" / "sgd"):
        for table, column in TIMES.items():
            if not (folder / f"{table}.parquet").exists():
                continue
            rows = pl.read_parquet(folder / f"{table}.parquet").select("tenant_id", at=column).drop_nulls()
            rows = rows.filter(pl.col("at").is_between(MONDAY - 6 * WEEK, MONDAY + 20 * WEEK))
            assert not watch_volume(rows).findings
            assert not watch_freshness(rows).findings
            talks = pl.read_parquet(folder / "conversations.parquet").select("tenant_id", at="started_at").drop_nulls()
            ended = end_of_export(talks.filter(pl.col("at").is_between(MONDAY - 6 * WEEK, MONDAY + 20 * WEEK)))
            assert ended is not None
            assert f"{ended:%Y-%m-%d}" == "2026-10-25"
            assert not watch_volume(rows, ended).findings
            assert not watch_freshness(rows, ended).findings
            for back in range(27, 75, 4):  # before the planted stragglers after 2026-10-25
                now = dt.datetime(2026, 11, 21, tzinfo=dt.UTC) - back * DAYS
                before = rows.filter(pl.col("at") <= now)
                assert not watch_volume(before, now).findings, (folder, now)
                assert not watch_freshness(before, now).findings, (folder, now)


def test_only_stored_conversations_of_the_last_weeks_are_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for n in range(20):
        week = MONDAY + n * WEEK
        rows = {"tenant_id": ["a", "a"], "started_at": [week, week], "kind": ["conversation", "imported"]}
        ids = {"conversation_id": ["1", "2"]}
        write_parquet(store.corpus("conversations", week.date().isoformat()) / "part.parquet", pl.DataFrame({**rows, **ids}))
    assert recent_rows(store, "conversations", 3)["at"].to_list() == [MONDAY + n * WEEK for n in (17, 18, 19)]
    assert recent_rows(store, "feedback").is_empty()
