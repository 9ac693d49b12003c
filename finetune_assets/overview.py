"""What `finetune status` and `finetune jobs` show: read from the ledger and the store, changing nothing but a cancelled job."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from finetune_assets.assistants import assistant_names, load_assistant
from finetune_assets.environment import Environment
from finetune_assets.errors import FinetuneError, LedgerError
from finetune_assets.registry import Job, Ledger
from finetune_assets.registry.remote_jobs import SUBMITTED, LedgerJournal, RemoteJob, open_remote, record, remote_job
from finetune_assets.registry.spending import month, release, settle, spent
from finetune_assets.registry.tables import OPEN_STATUSES, now
from finetune_assets.storage import Store, read_json
from finetune_assets.training.adrift import look_for
from finetune_assets.training.local import cancel
from finetune_assets.training.polling import ADRIFT
from finetune_assets.training.remote import CANCELLED, DOUBTFUL, Connection, RemoteTrainer
from finetune_assets.training.trainer import JobHandle, JobState
from finetune_assets.training.trainers import connect

UNSUBMITTED = "cancelled before it was submitted"


@contextmanager
def _ledger(environment: Environment) -> Generator[Ledger]:
    ledger = Ledger(environment.database_url)
    try:
        yield ledger
    finally:
        ledger.close()


def overview(environment: Environment) -> list[dict[str, Any]]:
    """One row an assistant: newest data set, job, version, verdict and champion."""
    store = Store(environment.home)
    with _ledger(environment) as ledger:
        made = [path.name for path in (environment.home / "datasets").glob("*") if path.is_dir()]
        names = {*assistant_names(environment.assistants), *made, *(job.assistant for job in ledger.jobs())}
        return [_row(environment, store, ledger, name) for name in sorted(names)]


def _row(environment: Environment, store: Store, ledger: Ledger, name: str) -> dict[str, Any]:
    manifest_file = store.datasets(name) / "latest" / "manifest.json"
    manifest = read_json(manifest_file) if manifest_file.exists() else None
    jobs, versions = ledger.jobs(name), ledger.versions(name)
    return {
        "assistant": name,
        "weeks": len(store.weeks("examples")),
        "fingerprint": manifest["fingerprint"] if manifest else None,
        "splits": manifest["counts"]["split"] if manifest else {},
        "job": jobs[0].id if jobs else None,
        "job_status": jobs[0].status if jobs else None,
        "version": versions[0].version if versions else None,
        "verdict": versions[0].verdict if versions else None,
        "report": versions[0].report if versions else None,
        "champion": ledger.rollout(name).champion,
        "spent_this_month_usd": round(sum(row["usd"] or 0.0 for row in month(ledger) if row["assistant"] == name), 4),
        "monthly_usd": _monthly_limit(environment, store, name),
        "open_remote_jobs": len(open_remote(ledger, name)),
    }


def _monthly_limit(environment: Environment, store: Store, name: str) -> float | None:
    try:
        return load_assistant(
            environment.assistants, name, read_json(store.tenants) if store.tenants.exists() else {}
        ).budget.monthly_usd
    except FinetuneError:
        return None  # one that has no settings any more


def job_rows(environment: Environment, assistant: str | None) -> list[dict[str, Any]]:
    """Jobs as plain rows, newest first."""
    with _ledger(environment) as ledger:
        return [{**vars(job), "seconds": job.seconds} for job in ledger.jobs(assistant)]


def job_detail(environment: Environment, job_id: str) -> dict[str, Any]:
    """One job with its folder and the last line of its progress. Raises LedgerError for an unknown one."""
    with _ledger(environment) as ledger:
        job, remote, cost = ledger.job(job_id), remote_job(ledger, job_id), spent(ledger, job_id)
    folder = Store(environment.home).job(job.spec_hash)
    detail = {**vars(job), "seconds": job.seconds, "folder": str(folder)}
    if remote is None:
        events = _events(environment, job)
        return {**detail, "progress": events[-1] if events else None}
    about = {
        "provider_status": remote.provider_status,
        "note": remote.note,
        "deadline": remote.deadline,
        "asked": remote.polled_at,
    }
    return {
        **detail,
        **about,
        "progress": remote.progress,
        "usd": (cost or {}).get("usd"),
        "usd_final": (cost or {}).get("final"),
    }


def job_events(environment: Environment, job_id: str) -> list[dict[str, Any]]:
    """The progress of a job, oldest first. Raises LedgerError for an unknown one."""
    with _ledger(environment) as ledger:
        job, remote = ledger.job(job_id), remote_job(ledger, job_id)
        if remote is None:
            return _events(environment, job)
        with _at_provider(environment, ledger, remote) as (trainer, handle):
            return trainer.events(handle)


def cancel_job(environment: Environment, job_id: str, ended: bool = False) -> str:
    """Stops a job that is open, or may still run at its provider; says what happened. Raises LedgerError for an unknown one.

    `ended`: of one that may still run, somebody has seen at the provider that it does not.
    """
    with _ledger(environment) as ledger:
        job, remote = ledger.job(job_id), remote_job(ledger, job_id)
        if job.status not in OPEN_STATUSES and remote is not None and remote.state.get(ADRIFT):
            return _cancel_adrift(environment, ledger, remote, ended)
        if job.status not in OPEN_STATUSES:
            return f"{job_id} is {job.status} already; nothing to cancel."
        if remote is None and job.provider != "local":
            # Whoever submits opens the journal, then reads the job: one of us sees what the other has written.
            ledger.set_job(job_id, "cancelled", error=UNSUBMITTED)
            remote = remote_job(ledger, job_id)
            if remote is None:
                return f"{job_id} is cancelled; it had not been submitted."
        if remote is not None:
            journal = LedgerJournal(ledger, job_id)
            begun = journal.save(**{CANCELLED: True})  # from here on nobody begins to create it
            if not begun.get(SUBMITTED) and not begun.get("create_started"):
                with closing(connect(Connection(**remote.connection), Store(environment.home), journal)) as at:
                    notes = at.clean_up(JobHandle(job.provider, "", job_id, job.dataset_fingerprint))
                release(ledger, job_id)
                ledger.set_job(job_id, "cancelled", error=UNSUBMITTED)
                return " ".join([f"{job_id} is cancelled; it had not been submitted.", *notes])
            journal.save(**{CANCELLED: None})  # too late to stop it here
            with _at_provider(environment, ledger, remote) as (trainer, handle):
                return _cancel_there(environment, ledger, job, trainer, handle)
        stopped = cancel(Store(environment.home).job(job.spec_hash))
        ledger.set_job(job_id, "cancelled", error="cancelled by a person")
    return f"{job_id} is cancelled" + ("." if stopped else "; no process was running it.")


def _cancel_adrift(environment: Environment, ledger: Ledger, remote: RemoteJob, ended: bool) -> str:
    job, journal = remote.job, LedgerJournal(ledger, remote.job.id)
    where = f"at {job.provider} ({job.provider_job_id or 'its id was never told'})"
    if ended:
        journal.save(**{ADRIFT: None})
        return f"{job.id} is taken as ended {where}; the next training may start."
    with closing(connect(Connection(**remote.connection), Store(environment.home), journal)) as trainer:
        word = look_for(ledger, remote, trainer, environment.tables)
        if word is not None and (handle := trainer.attach()) is not None:
            trainer.cancel(handle)
            word = look_for(ledger, remote, trainer, environment.tables)
    if word is not None:
        return f"{job.id} was asked to stop and still is {word!r} {where}; ask again in some minutes."
    taken = ledger.job(job.id).status in OPEN_STATUSES
    return f"{job.id} has " + (f"succeeded {where}; the next tick takes its model." if taken else f"ended {where}.")


def _cancel_there(environment: Environment, ledger: Ledger, job: Job, trainer: RemoteTrainer, handle: JobHandle) -> str:
    trainer.cancel(handle)
    state = trainer.poll(handle)
    if state.status in ("succeeded", "failed"):
        how = f" {state.progress['warning']}." if "warning" in state.progress else ""
        where = f"at {job.provider} ({handle.id})"
        return f"{job.id} has already {state.status} {where}; nothing to cancel, the next tick takes it.{how}"
    doubtful = bool(LedgerJournal(ledger, job.id).load().get(DOUBTFUL))
    if state.status != "cancelled" or doubtful:
        second = " A creation of it was not answered: ticks look for a second job first, and stop it." if doubtful else ""
        where = f"at {job.provider} ({handle.id})"
        return f"{job.id} is being stopped {where}; the next tick writes down its end and its cost.{second}"
    notes = trainer.clean_up(handle)
    usd = trainer.cost(state, job.base_model, job.status == "running", environment.tables)
    settle(ledger, job.id, usd, state.progress.get("trained_tokens"))
    ledger.set_job(job.id, "cancelled", error="cancelled by a person")
    return " ".join([f"{job.id} is cancelled at {job.provider} ({handle.id}).", *notes])


def hold_job(environment: Environment, job_id: str, pause: bool) -> JobState:
    """Pauses or resumes a remote job; its state afterwards. Raises LedgerError for one that runs here."""
    with _ledger(environment) as ledger:
        job, remote = ledger.job(job_id), remote_job(ledger, job_id)
        if job.status not in OPEN_STATUSES:
            raise LedgerError(f"{job_id} is {job.status} already; there is nothing to {'pause' if pause else 'resume'}.")
        if remote is None:
            raise LedgerError(
                f"{job_id} runs on this machine; cancel it, and it goes on from its last checkpoint when started again."
            )
        with _at_provider(environment, ledger, remote) as (trainer, handle):
            state = trainer.pause(handle) if pause else trainer.resume(handle)
        # From here on the time does not count for its deadline; that it does again is the next tick's to see.
        asked = remote.polled_at.replace(tzinfo=None) if remote.polled_at else None
        held = {"progress": {**remote.progress, "paused": True}} if pause else {"polled_at": asked}
        record(ledger, job_id, now(), provider_status=state.provider_status, **held)
        return state


@contextmanager
def _at_provider(environment: Environment, ledger: Ledger, remote: RemoteJob) -> Generator[tuple[RemoteTrainer, JobHandle]]:
    """The trainer of a remote job, and its handle. Raises LedgerError where the provider has no such job."""
    journal = LedgerJournal(ledger, remote.job.id)
    trainer = connect(Connection(**remote.connection), Store(environment.home), journal)
    try:
        handle = trainer.attach()
        if handle is None:
            begun = journal.load().get("create_started")
            why = "has not answered its creation, and lists no job of it yet; ask again in some minutes, or"
            why = f"{remote.job.provider} {why}" if begun else f"it has not been submitted to {remote.job.provider};"
            raise LedgerError(f"{remote.job.id}: {why} start its training again.")
        yield trainer, handle
    finally:
        trainer.close()


def _events(environment: Environment, job: Job) -> list[dict[str, Any]]:
    file: Path = Store(environment.home).job(job.spec_hash) / "progress.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line] if file.exists() else []
