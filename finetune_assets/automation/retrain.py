"""Questions the schedule, the sensors and the command line ask: who is due, which weeks, and how much feedback is new."""

from __future__ import annotations

import datetime
import hashlib
import math

import dagster as dg
import polars as pl

from finetune_assets.assets.partitions import assistants as assistant_partitions
from finetune_assets.corpus.ingest import stale_weeks
from finetune_assets.dataset import new_feedback
from finetune_assets.environment import Environment
from finetune_assets.errors import FinetuneError
from finetune_assets.registry import Ledger, erasures
from finetune_assets.registry.remote_jobs import open_remote
from finetune_assets.resources import AssistantsResource, LedgerResource, SourceResource, StoreResource
from finetune_assets.resources.claims import MAX_ATTEMPTS
from finetune_assets.resources.tags import RANGE_END, RANGE_START, REASON, TRAIN_AFTERWARDS

ACTIVE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def enrolled(instance: dg.DagsterInstance) -> list[str]:
    """Assistants that have a partition, sorted."""
    return sorted(instance.get_dynamic_partitions(str(assistant_partitions.name)))


def weekly_assistants(instance: dg.DagsterInstance, store: StoreResource, assistants: AssistantsResource) -> list[str]:
    """Enrolled assistants whose settings say `retrain: {weekly: true}`; one with broken settings is left out."""
    tenants = store.tenants()
    return [name for name in enrolled(instance) if _weekly(assistants, name, tenants)]


def erased_assistants(instance: dg.DagsterInstance, ledger: Ledger) -> list[str]:
    """Enrolled assistants whose newest training used rows of people who were erased since: they take part in the next weekly
    retrain, whatever `retrain.weekly` says."""
    return [name for name in enrolled(instance) if erasures.retrain_due(ledger, name)]


def _weekly(assistants: AssistantsResource, name: str, tenants: dict[str, str]) -> bool:
    try:
        return assistants.load(name, tenants).retrain.weekly
    except FinetuneError:
        return False  # its own run says what is wrong; the others go on


def this_week(today: datetime.date) -> str:
    """The Monday of a day's week."""
    return (today - datetime.timedelta(days=today.weekday())).isoformat()


def stale_range(source: SourceResource, store: StoreResource, ledger: LedgerResource, today: datetime.date) -> tuple[str, str]:
    """First and last week to rebuild: every missing or changed week that has a partition, and always the current one."""
    current = this_week(today)
    erased = ledger.erased(store.key, source.requests())
    weeks = [*partitioned(stale_weeks(store.store, source.read(erased)).stale, today), current]
    return min(weeks), max(weeks)


def partitioned(weeks: list[str], today: datetime.date) -> list[str]:
    """Those weeks that have a partition: from FINETUNE_FIRST_WEEK to the current one."""
    return [week for week in weeks if Environment.read().first_week.isoformat() <= week <= this_week(today)]


def enough_examples(store: StoreResource, assistants: AssistantsResource) -> list[str]:
    """Tenants without a file that have at least their `min_examples` of clean examples."""
    folder = store.store.home / "corpus" / "examples"
    tenants = store.tenants()
    if not tenants or not any(folder.glob("week=*/part.parquet")):
        return []
    frame = pl.scan_parquet(folder / "week=*" / "part.parquet", hive_partitioning=False)
    satisfied = frame.filter(pl.col("satisfaction_score") >= 4).group_by("tenant_id").len().collect()
    counts = {row["tenant_id"]: row["len"] for row in satisfied.to_dicts()}
    return sorted(tenant for tenant in tenants if counts.get(tenant, 0) >= _least(assistants, tenant, tenants))


def _least(assistants: AssistantsResource, tenant: str, tenants: dict[str, str]) -> float:
    try:
        return assistants.load(tenant, tenants).min_examples
    except FinetuneError:
        return math.inf  # a tenant whose id cannot be a partition key, or whose vertical's file is wrong, is not enrolled


def refresh_request(
    instance: dg.DagsterInstance, source: SourceResource, store: StoreResource, ledger: LedgerResource
) -> dg.RunRequest | None:
    """A corpus run over the weeks that are missing or changed; null: up to date, or it failed three times for this state."""
    staleness = stale_weeks(store.store, source.read(ledger.erased(store.key, source.requests())))
    stale = partitioned(staleness.stale, datetime.datetime.now(datetime.UTC).date())
    if not stale:
        return None
    state = hashlib.blake2b(f"{staleness.state} {stale}".encode(), digest_size=8).hexdigest()
    reason = f"source changed: {state}"
    attempt = next_attempt(instance, "prepare_corpus", {REASON: reason})
    if attempt > MAX_ATTEMPTS:
        return None
    tags = {RANGE_START: min(stale), RANGE_END: max(stale), REASON: reason}
    return dg.RunRequest(run_key=f"refresh:{state}:{attempt}", job_name="prepare_corpus", tags=tags)


def was_asked(instance: dg.DagsterInstance, run_key: str) -> bool:
    """Whether a run of this key was made, however it ended: Dagster makes no second one."""
    return instance.get_runs_count(dg.RunsFilter(tags={"dagster/run_key": run_key})) > 0


def next_attempt(instance: dg.DagsterInstance, job: str, tags: dict[str, str]) -> int:
    """One more than the runs of these tags that failed: Dagster never asks again for a run key, not even of a failed run."""
    failed = dg.RunsFilter(job_name=job, tags=tags, statuses=[dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED])
    return instance.get_runs_count(failed) + 1


def due_assistants(
    instance: dg.DagsterInstance, store: StoreResource, assistants: AssistantsResource, ledger: Ledger
) -> list[tuple[str, str, int]]:
    """(assistant, reason, new feedback) for each one that is not in training, and whose threshold is reached or whose newest
    training used rows of people who were erased since."""
    tenants, found = store.tenants(), list[tuple[str, str, int]]()
    for name in enrolled(instance):
        try:
            settings = assistants.load(name, tenants)
        except FinetuneError:
            continue  # its own run says what is wrong; the others go on
        trained = next((job.dataset_fingerprint for job in ledger.jobs(name) if job.status == "succeeded"), None)
        count = new_feedback(store.store, settings, trained)
        reached = count // settings.retrain.feedback_threshold
        erased = erasures.retrain_due(ledger, name)
        if not (erased or reached) or is_training(instance, name) or open_remote(ledger, name):
            continue
        if erased:
            found.append((name, f"erasure:{erased}", count))
        else:
            found.append((name, f"feedback:{trained or 'first'}:{reached}", count))
    return found


def is_training(instance: dg.DagsterInstance, assistant: str) -> bool:
    """Whether a run that trains this assistant, or prepares for it, is queued or running."""
    runs = instance.get_runs(dg.RunsFilter(statuses=ACTIVE), limit=200)
    due = (assistant in run.tags.get(TRAIN_AFTERWARDS, "").split(",") for run in runs if run.job_name == "prepare_corpus")
    partition = (run.tags.get("dagster/partition") == assistant for run in runs if run.job_name == "train")
    return any(due) or any(partition)
