"""What the sensors, the command line and the examination ask about rented trainers: open jobs, and models that end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import dagster as dg

from finetune_assets.assets.remote import announced
from finetune_assets.automation.retrain import next_attempt
from finetune_assets.environment import Environment
from finetune_assets.errors import DataError, FinetuneError
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import due, open_remote
from finetune_assets.registry.tables import now
from finetune_assets.resources import AssistantsResource, StoreResource, TrainerResource
from finetune_assets.resources.claims import MAX_ATTEMPTS
from finetune_assets.resources.tags import APPROVED, DATASET, LEAVING, MIGRATE_TO, REASON
from finetune_assets.storage import write_json
from finetune_assets.training import lifecycle
from finetune_assets.training.leftovers import delete_leftovers
from finetune_assets.training.lifecycle import Ending
from finetune_assets.training.polling import Polled, poll
from finetune_assets.training.remote import Connection, Journal, RemoteTrainer
from finetune_assets.training.tables import base_name
from finetune_assets.training.uses import Uses, uses_of

TICK_SECONDS = 40.0
"""A tick has sixty; what is not reached comes first in the next one."""


def poll_due(ledger: Ledger, store: StoreResource, trainer: TrainerResource, job_id: str | None = None) -> list[Polled]:
    """Asks for every open job that is due, then deletes what lost jobs left; `job_id`: only this one, due or not."""
    jobs = [job for job in open_remote(ledger) if job.job.id == job_id] if job_id else due(ledger, now())

    def connect(connection: Connection, journal: Journal) -> RemoteTrainer:
        return trainer.rented(connection, store.store, journal)

    began = time.monotonic()
    polled = poll(ledger, jobs, connect, Environment.read().tables, TICK_SECONDS) if jobs else []
    if job_id is None:
        delete_leftovers(ledger, connect, TICK_SECONDS / 2 - (time.monotonic() - began))
    return polled


def report_polled(log: logging.Logger, store: StoreResource, polled: Polled) -> None:
    """Says what is worth saying; a job that failed is a notice in `failures/`, like a run that failed."""
    job = polled.job
    if polled.ended and job.status != "succeeded":
        message = f"{job.id} of {job.assistant} at {job.provider} ended as {job.status}: {job.error or 'no reason given'}"
        log.error(message)
        notice = {"job": job.id, "partition": job.assistant, "causes": [job.error], "message": message}
        write_json(store.store.home / "failures" / f"{job.id}.json", notice)
    elif polled.note:
        log.warning(f"{job.id} of {job.assistant} at {job.provider}: {polled.note}")
    else:
        log.info(f"{job.id} of {job.assistant} at {job.provider}: {polled.provider_status}")


def rented_uses(store: StoreResource, assistants: AssistantsResource, ledger: Ledger, names: Iterable[str]) -> Uses:
    """Everything of the user's that depends on a rented model."""
    tenants, settings = store.tenants(), []
    for name in sorted({*assistants.names(), *names}):
        try:
            settings.append(assistants.load(name, tenants))
        except FinetuneError:
            continue  # its own run says what is wrong
    return uses_of(settings, ledger)


def dying(
    store: StoreResource,
    assistants: AssistantsResource,
    ledger: Ledger,
    trainer: TrainerResource,
    log: logging.Logger,
) -> list[Ending]:
    """Uses that lose their model or its training within the first warning, or have lost it, soonest first.

    Asks the providers where a key is set; where one does not answer in time, the dated table has to do.
    """
    uses = rented_uses(store, assistants, ledger, {job.assistant for job in ledger.jobs()})
    said = announced(uses, store, trainer, log)
    found = lifecycle.endings(uses.uses, lifecycle.today(), Environment.read().tables, said)
    return [one for one in found if one.urgent]


def migrations(
    instance: dg.DagsterInstance, store: StoreResource, assistants: AssistantsResource, found: Iterable[Ending]
) -> list[dg.RunRequest]:
    """One training an assistant whose served or newest model ends, on its successor and the newest frozen data set.

    The run key asks for it once for each assistant, base model that ends and successor, whatever is frozen or tuned meanwhile;
    one that failed is asked for again, MAX_ATTEMPTS times in all.
    """
    requests: dict[str, dg.RunRequest] = {}
    enrolled = set(instance.get_dynamic_partitions("assistant"))
    for one in found:
        use = one.use
        link = store.store.datasets(use.assistant) / "latest"
        if (
            use.successor is None
            or use.kind not in ("champion", "settings")
            or not one.stops
            or use.assistant in requests
            or use.assistant not in enrolled
            or not link.exists()
        ):
            continue
        leaving = f"{use.provider}/{base_name(use.model)}"
        attempt = next_attempt(
            instance, "migrate", {MIGRATE_TO: use.successor, LEAVING: leaving, "dagster/partition": use.assistant}
        )
        key = f"migrate:{use.assistant}:{leaving}:{use.successor}"
        reason = f"migration: {use.provider} {use.model} ends on {one.lifecycle.shutdown}"
        requests[use.assistant] = dg.RunRequest(
            run_key=key if attempt == 1 else f"{key}:{min(attempt, MAX_ATTEMPTS)}",
            job_name="migrate",
            partition_key=use.assistant,
            tags={MIGRATE_TO: use.successor, LEAVING: leaving, DATASET: link.resolve().name, REASON: reason},
        )
    return list(requests.values())


def distilled_in(instance: dg.DagsterInstance, run_id: str) -> str:
    """The fingerprint of what a run of `distilled_dataset` froze. Raises DataError where it made nothing."""
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    for entry in events:
        event = entry.asset_materialization
        if event is not None and event.asset_key == dg.AssetKey("distilled_dataset"):
            return str(event.metadata["fingerprint"].value)
    raise DataError(f"Run {run_id} has frozen no distilled data set; see its log.")


def migration_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.RunRequest:
    """The training that follows a distillation: its data set on the trainer and model that its tags name."""
    fingerprint = distilled_in(instance, run.run_id)
    assistant, target = run.tags["dagster/partition"], run.tags[MIGRATE_TO]
    tags = {MIGRATE_TO: target, DATASET: fingerprint, REASON: f"distilled by run {run.run_id}"}
    tags |= {APPROVED: run.tags[APPROVED]} if APPROVED in run.tags else {}
    return dg.RunRequest(run_key=f"distilled:{run.run_id}", partition_key=assistant, tags=tags)


def ending_observation(ending: Ending) -> dg.AssetObservation:
    """A model's last day on the timeline of `registered_model`."""
    days = ending.days_left if ending.days_left is not None else ending.next_days
    metadata = {"days_left": days or 0, "model": ending.use.model, "message": ending.text()}
    return dg.AssetObservation("registered_model", partition=ending.use.assistant, metadata=metadata)
