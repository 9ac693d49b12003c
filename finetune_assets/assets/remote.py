"""What the training assets do where a provider trains: permission and money before, submission, and the finished model."""

import datetime
import logging
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.assistants import Assistant
from finetune_assets.dataset import read_manifest
from finetune_assets.environment import Environment
from finetune_assets.errors import FinetuneError, SettingsError
from finetune_assets.registry import Job, Ledger
from finetune_assets.registry.remote_jobs import LedgerJournal, open_journal, remote_job
from finetune_assets.registry.spending import month, spent
from finetune_assets.resources import AssistantsResource, LedgerResource, StoreResource, TrainerResource
from finetune_assets.resources.tags import MIGRATE_TO
from finetune_assets.training import adrift, lifecycle
from finetune_assets.training.lifecycle import Ending, endings
from finetune_assets.training.migration import retarget
from finetune_assets.training.polling import REQUEST_SECONDS
from finetune_assets.training.remote import Connection, Journal, Notes, RemoteTrainer
from finetune_assets.training.screening import check_permission
from finetune_assets.training.submission import bill, check_month, estimate_of, submit
from finetune_assets.training.trainer import Estimate, JobHandle, TrainingRequest
from finetune_assets.training.trainers import open_hours
from finetune_assets.training.uses import Uses, uses_of

ANNOUNCED_SECONDS = 40.0
"""In which providers are asked for last days: a sensor's tick has sixty."""


@dataclass(frozen=True)
class Plan:
    """A training that is about to be bought."""

    request: TrainingRequest
    estimate: Estimate
    spec_hash: str


def settings_for(assistants: AssistantsResource, store: StoreResource, name: str, tags: Mapping[str, str]) -> Assistant:
    """An assistant's settings; a migration's run trains with another trainer and model."""
    assistant = assistants.load(name, store.tenants())
    return retarget(assistant, tags[MIGRATE_TO]) if MIGRATE_TO in tags else assistant


def check_remote(
    assistants: AssistantsResource,
    store: StoreResource,
    ledger: LedgerResource,
    trainer: TrainerResource,
    assistant: Assistant,
    plan: Plan,
) -> None:
    """Who forbids it, whether the money is there, and whether an earlier job may still run. Raises before anything is sent:
    SettingsError, BudgetExceeded, TrainingError."""
    request = plan.request
    check_leaves(assistants, store, assistant, request.dataset)
    due = bill(assistant, request, plan.estimate, Environment.read().monthly_usd, "")
    with ledger.open() as book:
        same = {job.status for job in book.jobs(assistant.name) if job.spec_hash == plan.spec_hash}
        if not same - {"failed", "cancelled"}:  # else it is bought already
            check_month(book, due)
            connect = partial(_rented, trainer, store)
            adrift.check(book, assistant.name, assistant.trainer, connect, request.tables)


def _rented(trainer: TrainerResource, store: StoreResource, connection: Connection, journal: Journal) -> RemoteTrainer:
    return trainer.rented(connection, store.store, journal)


def check_leaves(assistants: AssistantsResource, store: StoreResource, assistant: Assistant, dataset: Path) -> None:
    """Raises SettingsError where the assistant, or a tenant whose rows are in the data set, lets nothing leave the machine."""
    check_permission(assistant.name, assistant.remote.allowed, forbidding_tenants(assistants, store, dataset))


def forbidding_tenants(assistants: AssistantsResource, store: StoreResource, dataset: Path) -> list[str]:
    """Those of `forbidding` with rows in the data set; sorted. Raises as it does."""
    return sorted(forbidding(assistants, store) & set(read_manifest(dataset)["counts"].get("tenant", {})))


def forbidding(assistants: AssistantsResource, store: StoreResource) -> set[str]:
    """Tenants whose own file says `remote.allowed: false`, whatever the file is called.

    Raises SettingsError for a file that cannot be read, whatever its name: nobody knows whose wish it holds.
    """
    found = set[str]()
    for name in assistants.names():
        try:
            settings = assistants.load(name, store.tenants())
        except FinetuneError as error:
            raise SettingsError(
                f"No rows leave this machine while the settings of {name} cannot be read: they may forbid it. {error}"
            ) from None
        if not settings.remote.allowed:
            found.add(settings.select.tenant or name)
    return found


def ending_models(
    context: dg.AssetCheckExecutionContext,
    assistants: AssistantsResource,
    store: StoreResource,
    book: Ledger,
    trainer: TrainerResource,
) -> list[Ending]:
    """Rented models of an assistant whose last day is known, soonest first: by the provider's word, else by the dated table."""
    name = context.partition_key
    uses = uses_of([assistants.load(name, store.tenants())], book)
    own = Uses([use for use in uses.uses if use.assistant == name], uses.places, uses.models)
    return endings(own.uses, lifecycle.today(), Environment.read().tables, announced(own, store, trainer, context.log))


def announced(
    uses: Uses, store: StoreResource, trainer: TrainerResource, log: logging.Logger
) -> dict[tuple[str, str], datetime.date]:
    """(provider, model) to the last day that the provider itself gives, as far as providers answer within ANNOUNCED_SECONDS."""
    end, found = time.monotonic() + ANNOUNCED_SECONDS, dict[tuple[str, str], datetime.date]()
    for connection in uses.connections:
        in_time = takewhile(lambda _: time.monotonic() < end, uses.models_at(connection))
        try:
            with closing(trainer.rented(connection, store.store, Notes()).hurried(REQUEST_SECONDS)) as asked:
                said = asked.shutdown_dates(in_time)
        except FinetuneError as error:
            log.info(f"{connection.provider} was not asked for last days, the dated table has to do: {error}")
            continue
        found |= {(connection.provider, model): day for model, day in said.items()}
    return found


def replaced_by(ledger: LedgerResource, name: str, tags: Mapping[str, str]) -> str | None:
    """The version that a migration leaves: the champion, else the newest. Null where this run is none, or there is no version."""
    if MIGRATE_TO not in tags:
        return None
    with ledger.open() as book:
        versions = book.versions(name)
        return book.rollout(name).champion or (versions[0].version if versions else None)


def submit_remote(
    trainer: TrainerResource, store: StoreResource, book: Ledger, assistant: Assistant, request: TrainingRequest, job: Job
) -> Job:
    """Submits the ledger's job where that is still to be done; ends long before the training does."""
    if job.status not in ("pending", "running"):
        return job
    connection = Connection.of(assistant)
    journal = open_journal(book, job.id, connection.to_dict(), open_hours(connection))
    due = bill(assistant, request, estimate_of(job.plan), Environment.read().monthly_usd, job.id)
    with closing(trainer.rented(connection, store.store, journal)) as backend:
        return submit(book, job, backend, request, due)


def remote_metadata(book: Ledger, job: Job) -> dict[str, Any]:
    """Numbers and words of a remote job for its asset page."""
    remote, cost = remote_job(book, job.id), spent(book, job.id) or {}
    this_month = [row["usd"] or 0.0 for row in month(book) if row["assistant"] == job.assistant]
    metadata: dict[str, Any] = {
        "job": job.id,
        "state": job.status if job.status not in ("pending", "running") else "submitted",
        "provider": job.provider,
        "provider_job": job.provider_job_id or "",
        "provider_status": (remote.provider_status if remote else None) or "",
        "estimated_tokens": int(job.plan.get("tokens") or 0),
        "spent_this_month_usd": round(sum(this_month), 4),
    }
    if job.plan.get("usd") is not None:
        metadata["estimated_usd"] = round(float(job.plan["usd"]), 4)
    if cost.get("final") and cost.get("usd") is not None:
        metadata["actual_usd"] = round(float(cost["usd"]), 4)
        if job.plan.get("usd") is not None:
            metadata["difference_usd"] = round(float(cost["usd"]) - float(job.plan["usd"]), 4)
    if job.trained_tokens:
        metadata["trained_tokens"] = job.trained_tokens
    told = {key: value for key, value in (remote.progress if remote else {}).items() if isinstance(value, int | float | str)}
    metadata |= {f"progress/{key}": value for key, value in told.items() if not isinstance(value, bool) and key != "warning"}
    if remote and remote.note:
        metadata["note"] = remote.note
    return metadata


def keep_remote(trainer: TrainerResource, store: StoreResource, book: Ledger, job: Job) -> None:
    """Fetches what a finished job left at the provider, once. Raises TrainingError where its model is gone."""
    folder, remote = store.store.job(job.spec_hash), remote_job(book, job.id)
    if remote is None:
        return
    handle = JobHandle(job.provider, job.provider_job_id or "", job.id, job.dataset_fingerprint)
    with closing(trainer.rented(Connection(**remote.connection), store.store, LedgerJournal(book, job.id))) as backend:
        if not (folder / "result.json").exists():
            known = {"usd": (spent(book, job.id) or {}).get("usd"), "hyperparameters": job.hyperparameters}
            backend.keep(handle, folder, {**job.plan, **known, "base_model": job.base_model})
        backend.clean_up(handle)  # where the sensor could not


def observation(book: Ledger, job: Job) -> dg.AssetObservation:
    """What is known of an open or ended job, for the timeline of `training_job`."""
    return dg.AssetObservation("training_job", partition=job.assistant, metadata=remote_metadata(book, job))
