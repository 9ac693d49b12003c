"""What `finetune status` and `finetune jobs` show: read from the ledger and the store, changing nothing but a cancelled job."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_assets.assistants import assistant_names
from finetune_assets.environment import Environment
from finetune_assets.registry import Job, Ledger
from finetune_assets.registry.tables import OPEN_STATUSES
from finetune_assets.storage import Store, read_json
from finetune_assets.training.local import cancel


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
    weeks = len(store.weeks("examples"))
    with _ledger(environment) as ledger:
        made = [path.name for path in (environment.home / "datasets").glob("*") if path.is_dir()]
        names = {*assistant_names(environment.assistants), *made, *(job.assistant for job in ledger.jobs())}
        return [_row(store, ledger, name, weeks) for name in sorted(names)]


def _row(store: Store, ledger: Ledger, name: str, weeks: int) -> dict[str, Any]:
    manifest_file = store.datasets(name) / "latest" / "manifest.json"
    manifest = read_json(manifest_file) if manifest_file.exists() else None
    jobs, versions = ledger.jobs(name), ledger.versions(name)
    return {
        "assistant": name,
        "weeks": weeks,
        "fingerprint": manifest["fingerprint"] if manifest else None,
        "splits": manifest["counts"]["split"] if manifest else {},
        "job": jobs[0].id if jobs else None,
        "job_status": jobs[0].status if jobs else None,
        "version": versions[0].version if versions else None,
        "verdict": versions[0].verdict if versions else None,
        "report": versions[0].report if versions else None,
        "champion": ledger.rollout(name).champion,
    }


def job_rows(environment: Environment, assistant: str | None) -> list[dict[str, Any]]:
    """Jobs as plain rows, newest first."""
    with _ledger(environment) as ledger:
        return [{**vars(job), "seconds": job.seconds} for job in ledger.jobs(assistant)]


def job_detail(environment: Environment, job_id: str) -> dict[str, Any]:
    """One job with its folder and the last line of its progress. Raises LedgerError for an unknown one."""
    with _ledger(environment) as ledger:
        job = ledger.job(job_id)
    events = _events(environment, job)
    folder = Store(environment.home).job(job.spec_hash)
    return {**vars(job), "seconds": job.seconds, "folder": str(folder), "progress": events[-1] if events else None}


def job_events(environment: Environment, job_id: str) -> list[dict[str, Any]]:
    """The progress of a job, oldest first. Raises LedgerError for an unknown one."""
    with _ledger(environment) as ledger:
        return _events(environment, ledger.job(job_id))


def cancel_job(environment: Environment, job_id: str) -> str:
    """Stops a job that is open; says what happened. Raises LedgerError for an unknown one."""
    with _ledger(environment) as ledger:
        job = ledger.job(job_id)
        if job.status not in OPEN_STATUSES:
            return f"{job_id} has already {job.status}; nothing to cancel."
        stopped = cancel(Store(environment.home).job(job.spec_hash))
        ledger.set_job(job_id, "cancelled", error="cancelled from the command line")
    return f"{job_id} is cancelled" + ("." if stopped else "; no process was running it.")


def _events(environment: Environment, job: Job) -> list[dict[str, Any]]:
    file: Path = Store(environment.home).job(job.spec_hash) / "progress.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line] if file.exists() else []
