"""Watch over the source: whether each tenant's feed still comes, and as much as usual. Seen before a model is trained on it.

These checks do not block: a tenant that closed for a week must not stop the others' training. ERROR: a feed stopped; WARN: it
may be chance. How they decide is told in `corpus/watch.py`.
"""

import datetime as dt
from typing import Any

import dagster as dg

from finetune_assets.assets.corpus import raw_conversations, rlhf_feedback
from finetune_assets.assets.metadata import records_table
from finetune_assets.corpus.watch import Table, Watched, age_days, recent_rows, watch, watch_freshness, watch_volume
from finetune_assets.environment import Environment
from finetune_assets.registry import erasures
from finetune_assets.resources import LedgerResource, SourceResource, StoreResource

LATE_DAYS = 7
"""Days after which a request that waits is an error; the GDPR (article 12) allows a month."""
COLUMNS = ["tenant", "what", "week", "seen", "usual", "deviations", "error"]


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _volume(store: StoreResource, source: SourceResource, table: Table) -> dg.AssetCheckResult:
    watched = watch(store.store, table, source.addresses(), _now(), watch_volume)
    return _result(watched, "the running week and the one before it have as many rows as usual", {})


def _freshness(store: StoreResource, source: SourceResource, table: Table) -> dg.AssetCheckResult:
    now, most = _now(), Environment.read().fresh_days
    watched = watch(store.store, table, source.addresses(), now, watch_freshness)
    age = age_days(recent_rows(store.store, table), now)
    metadata: dict[str, Any] = {} if age is None else {"days_since_newest_row": round(age, 2)}
    if most is not None and (age is None or age > most):
        told = "There is no row" if age is None else f"The newest row is {age:.1f} days old"
        return dg.AssetCheckResult(
            passed=False,
            severity=dg.AssetCheckSeverity.ERROR,
            description=f"{told}; FINETUNE_FRESH_DAYS allows {most:g}. Is the export still running?",
            metadata=metadata,
        )
    return _result(watched, "the newest row of each is as recent as usual", metadata)


def _result(watched: Watched, fine: str, metadata: dict[str, Any]) -> dg.AssetCheckResult:
    findings = watched.findings
    stopped = any(one.error for one in findings)
    said = "; ".join(one.sentence for one in findings[:5])
    young = watched.tenants - watched.judged
    few = f" {young} tenants have too little history to be judged." if young else ""
    return dg.AssetCheckResult(
        passed=not findings,
        severity=dg.AssetCheckSeverity.ERROR if stopped else dg.AssetCheckSeverity.WARN,
        description=f"{said}. Look at the source before you train." if findings else f"{watched.judged} tenants: {fine}.{few}",
        metadata={
            "tenants_judged": watched.judged,
            "tenants": watched.tenants,
            "as_of": str(watched.as_of),
            "findings": records_table([one.record() for one in findings], COLUMNS),
            **metadata,
        },
    )


@dg.asset_check(asset=raw_conversations)
def conversations_as_many_as_usual(store: StoreResource, source: SourceResource) -> dg.AssetCheckResult:
    """No tenant's conversations stopped, halved or doubled beside its previous weeks (up to 12, the same hour of the week)."""
    return _volume(store, source, "conversations")


@dg.asset_check(asset=raw_conversations)
def conversations_fresh(store: StoreResource, source: SourceResource) -> dg.AssetCheckResult:
    """No tenant's newest conversation is twice as long ago as its longest gap; nor older than FINETUNE_FRESH_DAYS, where set."""
    return _freshness(store, source, "conversations")


@dg.asset_check(asset=rlhf_feedback)
def feedback_as_much_as_usual(store: StoreResource, source: SourceResource) -> dg.AssetCheckResult:
    """No tenant's feedback stopped, halved or doubled beside its previous weeks (up to 12, the same hour of the week)."""
    return _volume(store, source, "feedback")


@dg.asset_check(asset=rlhf_feedback)
def feedback_fresh(store: StoreResource, source: SourceResource) -> dg.AssetCheckResult:
    """No tenant's newest feedback is twice as long ago as its longest gap; nor older than FINETUNE_FRESH_DAYS, where set."""
    return _freshness(store, source, "feedback")


@dg.asset_check(asset=raw_conversations)
def erasure_requests_applied(ledger: LedgerResource) -> dg.AssetCheckResult:
    """Nobody who asked in the source to be forgotten is still in the store: `finetune erase --requests` removes them."""
    with ledger.open() as book:
        waiting = [one for one in erasures.all_erasures(book) if one.completed_at is None]
    days = max(((_now() - one.requested_at).days for one in waiting), default=0)
    told = (
        f"{len(waiting)} wait, the first for {days} days: run `finetune erase --requests`. No build reads their rows meanwhile."
    )
    return dg.AssetCheckResult(
        passed=not waiting,
        severity=dg.AssetCheckSeverity.ERROR if days >= LATE_DAYS else dg.AssetCheckSeverity.WARN,
        description=told if waiting else "Nobody waits.",
        metadata={"waiting": len(waiting), "longest_days": days},
    )


ASSETS: list[dg.AssetsDefinition] = []
CHECKS = [
    conversations_as_many_as_usual,
    conversations_fresh,
    feedback_as_much_as_usual,
    feedback_fresh,
    erasure_requests_applied,
]
