"""Is the source still what it was: tenants whose feed stopped, fell or doubled, and how old the newest row is.

Only stored rows of the last weeks are read, so the cost does not grow with the history. Imported rows are no feed.

- Volume: a week's rows of a tenant beside those of its previous weeks, counted up to the same hour of the week: so a week that
  is still running is compared with as much of the others. Counts are compared as 2 √(n + 3/8) (Anscombe, Biometrika 35, 1948:
  a Poisson count then has standard deviation 1), by median and median absolute deviation. A finding is 4 deviations away, and
  half or less, or 1.75 times or more: so neither a quiet tenant nor a tiny change of a busy one is one.
- A database is compared with the clock. A folder of exports is a picture of the past: it is compared with where its conversations
  end, feedback too. Its last weeks with next to no rows (a twentieth of the usual number, or up to 3) are stragglers behind that
  end, and no finding. Where there are both, tenants that have conversations in a database are compared with the clock.
- Freshness: the time since a tenant's newest row beside the longest gap that it had in those weeks. Of n past gaps and the
  present one each is equally likely the longest, so a finding is twice as long.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from finetune_assets.corpus.databases import address
from finetune_assets.corpus.imports import SETTINGS
from finetune_assets.corpus.index import known_ids
from finetune_assets.corpus.schema import KINDS, TIME
from finetune_assets.storage import Store

Table = Literal["conversations", "feedback"]
TIMES: dict[Table, str] = {"conversations": "started_at", "feedback": "created_at"}
IDS: dict[Table, str] = {"conversations": "conversation_id", "feedback": "feedback_id"}
HISTORY = 12  # weeks before the judged one
LEAST_WEEKS = 6  # of history; with fewer nothing is judged
LEAST_GAPS = 20
FAR = 4.0  # deviations
FELL, ROSE = 0.5, 1.75  # times the median
LATE, STOPPED = 2.0, 4.0  # times the longest gap
RAGGED, STRAGGLERS = 0.05, 3  # share of the median, and rows, of a week behind the end of an export
HOUR, WEEK = dt.timedelta(hours=1), dt.timedelta(weeks=1)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as usual. `error`: a feed that stopped, else it may be chance."""

    tenant: str
    what: str  # stopped, fell, rose, late
    week: str  # Monday
    seen: float  # rows of the week; or hours since the newest row
    usual: float  # median rows; or hours of the longest gap
    deviations: float | None
    error: bool

    @property
    def sentence(self) -> str:
        """For a description."""
        if self.what == "late":
            return f"{self.tenant}: no row for {self.seen:,.0f} h, the longest gap was {self.usual:,.0f} h"
        return f"{self.tenant} {self.what}: {self.seen:,.0f} rows in the week of {self.week}, usually {self.usual:,.0f}"

    def record(self) -> dict[str, Any]:
        """As a row of a table."""
        return asdict(self)


@dataclass(frozen=True)
class Watched:
    """What was found, and how many tenants had enough history to be judged."""

    findings: list[Finding]
    judged: int
    tenants: int
    as_of: dt.datetime | None


def recent_rows(store: Store, table: Table, weeks: int = HISTORY + 2) -> pl.DataFrame:
    """tenant_id, id and `at` of the rows of the newest stored weeks."""
    column = TIMES[table]
    files = [store.corpus(table, week) / "part.parquet" for week in store.weeks(table)]
    files = [file for file in files if file.exists()][-weeks:]
    if not files:
        return pl.DataFrame(schema={"tenant_id": pl.String, "id": pl.String, "at": TIME})
    rows = pl.scan_parquet(files, hive_partitioning=False)
    if table == "conversations":
        rows = rows.filter(pl.col("kind") == KINDS[0])
    return rows.select("tenant_id", id=IDS[table], at=column).drop_nulls().collect()


def watch(store: Store, table: Table, sources: Sequence[str], now: dt.datetime, judge_rows: Callable[..., Watched]) -> Watched:
    """`watch_volume` or `watch_freshness` of the stored rows, those of databases by the clock, the others by where they end."""
    rows, talks = recent_rows(store, table), recent_rows(store, "conversations")
    databases, folders = feeds(sources)
    if databases and not folders:
        return judge_rows(rows, now)
    held = known_ids(store, "conversations", talks["id"], tuple(f"{address(one)} " for one in databases))
    live = talks["tenant_id"].filter(held).unique().implode()
    by_clock = judge_rows(rows.filter(pl.col("tenant_id").is_in(live)), now)
    ended = end_of_export(talks.filter(~pl.col("tenant_id").is_in(live)))
    by_end = judge_rows(rows.filter(~pl.col("tenant_id").is_in(live)), ended)
    findings = sorted([*by_clock.findings, *by_end.findings], key=lambda one: not one.error)
    judged, tenants = by_clock.judged + by_end.judged, by_clock.tenants + by_end.tenants
    return Watched(findings, judged, tenants, ended if by_end.tenants else now)


def watch_volume(rows: pl.DataFrame, as_of: dt.datetime | None = None) -> Watched:
    """The running week and the one before it, of each tenant. `as_of` null: where the export ends."""
    now = as_of or end_of_export(rows)
    if now is None:
        return Watched([], 0, 0, None)
    running = _monday(now)
    findings: list[Finding] = []
    judged: set[str] = set()
    for monday, upto in ((running, now), (running - WEEK, running - dt.timedelta(microseconds=1))):
        for tenant, counts in weekly_counts(rows, monday, upto).items():
            if len(counts) <= LEAST_WEEKS:
                continue
            judged.add(tenant)
            if found := judge(counts[:-1], counts[-1]):
                what, deviations = found
                usual = float(np.median(counts[:-1]))
                findings.append(
                    Finding(tenant, what, monday.date().isoformat(), counts[-1], usual, round(deviations, 1), what == "stopped")
                )
    newest_first = sorted(findings, key=lambda one: (not one.error, one.tenant, one.week))
    return Watched(newest_first, len(judged), rows["tenant_id"].n_unique(), now)


def weekly_counts(rows: pl.DataFrame, monday: dt.datetime, upto: dt.datetime) -> dict[str, list[int]]:
    """Rows of each tenant in each of the weeks up to the one of `monday`, each up to the hour of the week of `upto`.

    A tenant's first week is left out: it began somewhere in it.
    """
    start, offset = pl.col("at").dt.truncate("1w"), upto - monday
    within = rows.with_columns(start=start).filter((start <= monday) & (start >= monday - HISTORY * WEEK))
    firsts = rows.group_by("tenant_id").agg(first=start.min())
    counted = within.filter(pl.col("at") - pl.col("start") <= offset).group_by("tenant_id", "start").len()
    numbers = {(tenant, week): rows for tenant, week, rows in counted.iter_rows()}
    made: dict[str, list[int]] = {}
    for tenant, first in firsts.sort("tenant_id").iter_rows():
        weeks = [monday - n * WEEK for n in range(HISTORY, -1, -1)]
        made[tenant] = [numbers.get((tenant, week), 0) for week in weeks if week > first]
    return made


def judge(past: Sequence[int], now: int) -> tuple[str, float] | None:
    """`stopped`, `fell` or `rose` and by how many deviations; null for a usual count. The order of `past` does not matter."""
    usual = float(np.median(past))
    before, after = _stable(np.asarray(past, dtype=np.float64)), float(_stable(np.float64(now)))
    middle = float(np.median(before))
    spread = max(1.0, 1.4826 * float(np.median(np.abs(before - middle))))
    deviations = (after - middle) / spread
    if deviations <= -FAR and now <= FELL * usual:
        return "stopped" if now == 0 else "fell", deviations
    return ("rose", deviations) if deviations >= FAR and now >= ROSE * usual else None


def _stable(counts: Any) -> Any:
    return 2 * np.sqrt(counts + 3 / 8)


def watch_freshness(rows: pl.DataFrame, as_of: dt.datetime | None = None) -> Watched:
    """Tenants whose newest row is older than their usual gap. `as_of` null: where the export ends."""
    now = as_of or end_of_export(rows)
    if now is None:
        return Watched([], 0, 0, None)
    gaps = rows.filter(pl.col("at") <= now).sort("tenant_id", "at").group_by("tenant_id", maintain_order=True)
    at = pl.col("at")
    table = gaps.agg(gaps=pl.len() - 1, first=at.min(), longest=at.diff().max(), newest=at.max())
    table = table.filter((pl.col("gaps") >= LEAST_GAPS) & (pl.col("first") <= now - LEAST_WEEKS * WEEK))
    findings: list[Finding] = []
    for tenant, longest, newest in table.select("tenant_id", "longest", "newest").iter_rows():
        since = now - newest
        if since > LATE * longest and since > HOUR:
            week = _monday(newest).date().isoformat()
            findings.append(Finding(tenant, "late", week, since / HOUR, longest / HOUR, None, since > STOPPED * longest))
    return Watched(sorted(findings, key=lambda one: -one.seen), table.height, rows["tenant_id"].n_unique(), now)


def end_of_export(rows: pl.DataFrame) -> dt.datetime | None:
    """The newest row before the stragglers; null without rows."""
    whole = rows.select(pl.lit("all").alias("tenant_id"), "at")
    while isinstance(newest := whole["at"].max(), dt.datetime):
        monday = _monday(newest)
        counts = weekly_counts(whole, monday, newest)["all"]
        found = judge(counts[:-1], counts[-1]) if len(counts) > LEAST_WEEKS else None
        if found is None or counts[-1] > max(STRAGGLERS, RAGGED * float(np.median(counts[:-1]))):
            return newest
        whole = whole.filter(pl.col("at") < monday)
    return None


def age_days(rows: pl.DataFrame, now: dt.datetime) -> float | None:
    """Days since the newest row of all; null without rows."""
    newest = rows["at"].max()
    return (now - newest) / dt.timedelta(days=1) if isinstance(newest, dt.datetime) else None


def feeds(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """The databases and the folders of exports. A folder with a `source.yaml` holds imported rows, which are no feed."""
    databases = [source for source in sources if "://" in source]
    return databases, [source for source in sources if "://" not in source and not (Path(source) / SETTINGS).exists()]


def _monday(time: dt.datetime) -> dt.datetime:
    return (time - dt.timedelta(days=time.weekday())).replace(hour=0, minute=0, second=0, microsecond=0)
