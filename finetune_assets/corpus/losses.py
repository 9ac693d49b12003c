"""How much of what was read was dropped, a table of the source at a time: a wrong mapping must not pass for a thin corpus.

Numbers and reasons are those that the weeks hold (`counts.json`, `corpus/rejected`). Rows without a usable time are of no week:
they count where every stored week is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.corpus.schema import UNKNOWN_WEEK
from finetune_assets.corpus.staleness import counts_of
from finetune_assets.corpus.undated import MEMBERS
from finetune_assets.storage import Store, read_json

LARGE = 0.05  # of the rows: broken rows of a sound export stay below it, a wrong column, role or time zone lies far above
LEAST = 20  # rows: a share of fewer is chance
SHOWN = 3  # reasons in a sentence


@dataclass(frozen=True)
class Loss:
    """Dropped rows of one table; `reasons` to their rows, the most frequent first. `example`: an id for `finetune explain`."""

    table: str
    read: int
    dropped: int
    reasons: dict[str, int]
    example: str | None
    folder: Path

    @property
    def large(self) -> bool:
        """Whether somebody should look."""
        return self.dropped >= LEAST and self.dropped > LARGE * self.read

    @property
    def sentence(self) -> str:
        """Rows, share and reasons, and where to look."""
        rows = "feedback rows" if self.table == "feedback" else self.table
        few = ", ".join(f"{reason} {count:,}" for reason, count in list(self.reasons.items())[:SHOWN])
        more = f" and {len(self.reasons) - SHOWN} more reasons" if len(self.reasons) > SHOWN else ""
        ask = f", finetune explain {self.example}" if self.example else ""
        share = self.dropped / self.read
        return f"{self.dropped:,} of {self.read:,} {rows} read ({share:.0%}) were dropped: {few}{more}. See {self.folder}{ask}."

    def record(self) -> dict[str, Any]:
        """As a row of a table."""
        few = ", ".join(f"{reason} {count}" for reason, count in self.reasons.items())
        return {
            "table": self.table,
            "read": self.read,
            "dropped": self.dropped,
            "share": self.dropped / self.read,
            "reasons": few,
        }


def losses(store: Store, members: Sequence[str] = tuple(MEMBERS), first: str = "", last: str = "") -> list[Loss]:
    """Tables that lost rows in the stored weeks from `first` to `last` (Mondays; empty: all); `members` as in `MEMBERS`."""
    return [loss for member in members for loss in _of(store, member, first, last)]


def _of(store: Store, member: str, first: str, last: str) -> list[Loss]:
    stored = store.weeks(member)
    weeks = [week for week in stored if first <= week and (not last or week <= last)]
    numbers = [counts_of(store.corpus(member, week)) for week in weeks]
    undated = store.corpus("rejected", UNKNOWN_WEEK) / f"{member}_counts.json"
    if weeks == stored and undated.exists():
        weeks = [*weeks, UNKNOWN_WEEK]
        numbers.append(read_json(undated))
    found: list[Loss] = []
    for table in MEMBERS[member]:
        read, dropped = (sum(one.get(what, {}).get(table, 0) for one in numbers) for what in ("read", "dropped"))
        if dropped:
            reasons, example = _reasons(store, member, table, weeks)
            found.append(Loss(table, read, dropped, reasons, example, store.home / "corpus" / "rejected"))
    return found


def _reasons(store: Store, member: str, table: str, weeks: Sequence[str]) -> tuple[dict[str, int], str | None]:
    files = (store.corpus("rejected", week) / f"{member}.parquet" for week in weeks)
    columns = ["table", "id", "reason", "action"]
    frames = [pl.read_parquet(file, columns=columns, hive_partitioning=False) for file in files if file.exists()]
    rows = pl.concat([pl.DataFrame(schema=dict.fromkeys(columns, pl.String)), *frames])
    rows = rows.filter((pl.col("table") == table) & (pl.col("action") == "dropped"))
    counted = rows.group_by("reason").agg(pl.len(), pl.col("id").min()).sort("len", "reason", descending=[True, False])
    return dict(counted.select("reason", "len").iter_rows()), next(iter(counted["id"].to_list()), None)
