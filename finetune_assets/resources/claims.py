"""Who takes a finished job into phase two: exactly one run, and another one if that run died.

A claim names its owner, `run:<run id>` or `cli:<host>:<pid>`. A run lives while Dagster says so; a command line lives while
somebody holds the store's `run.lock`, which every command line holds from start to end and the system gives back when it dies.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import dagster as dg
from filelock import FileLock, Timeout

from finetune_assets.errors import LedgerError
from finetune_assets.registry import Job, Ledger, Version
from finetune_assets.resources.tags import JOB
from finetune_assets.storage import Store, read_json

MAX_ATTEMPTS = 3


def run_lock(home: Path) -> FileLock:
    """The lock that a command line holds on its store while it works."""
    return FileLock(home / "run.lock")


def cli_owner() -> str:
    """The claim of this process."""
    return f"cli:{socket.gethostname()}:{os.getpid()}"


def waiting_jobs(instance: dg.DagsterInstance, ledger: Ledger, home: Path) -> list[Job]:
    """Succeeded jobs without a finished phase two and without a living owner, oldest first, tried less than three times."""
    jobs = [job for job in ledger.unreleased() if job.release_attempt < MAX_ATTEMPTS]
    return [job for job in jobs if not owner_lives(instance, job.released_by, home)]


def claim(instance: dg.DagsterInstance, ledger: Ledger, job: Job, owner: str, home: Path) -> bool:
    """Claims phase two of a job; true if it is ours, because it was free, already ours, or its owner is gone."""
    if job.released_by == owner:
        return True
    # Whoever holds run.lock knows that no other command line lives.
    ours = owner == cli_owner() and (job.released_by or "").startswith("cli:")
    alive = not ours and owner_lives(instance, job.released_by, home)
    return not alive and ledger.claim_release(job.id, owner, job.released_by)


def owner_lives(instance: dg.DagsterInstance, owner: str | None, home: Path) -> bool:
    """Whether the owner of a claim can still finish it."""
    if owner is None:
        return False
    kind, _, rest = owner.partition(":")
    if kind == "cli":
        return owner == cli_owner() or _is_held(home)
    run = instance.get_run_by_id(rest)
    return run is not None and not run.is_finished


def _is_held(home: Path) -> bool:
    lock = run_lock(home)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def current_job(store: Store, ledger: Ledger, assistant: str, tags: Mapping[str, str]) -> Job:
    """The job of a phase-two run: that of its tag, else the one the newest plan led to, else the newest that succeeded.

    Raises LedgerError if the assistant has no finished job.
    """
    if JOB in tags:
        return ledger.job(tags[JOB])
    plan = read_json(store.plan(assistant)) if store.plan(assistant).exists() else {}
    finished = [job for job in ledger.jobs(assistant) if job.status == "succeeded"]
    for job in finished:
        if job.spec_hash == plan.get("spec_hash"):
            return job
    if not finished:
        raise LedgerError(f"{assistant} has no finished training job; materialise training_job first.")
    return finished[0]


def current_version(store: Store, ledger: Ledger, assistant: str, tags: Mapping[str, str]) -> Version:
    """The version of `current_job`. Raises LedgerError where it has none yet."""
    job = current_job(store, ledger, assistant, tags)
    if job.fine_tuned_model is None:
        raise LedgerError(f"{job.id} of {assistant} has no version yet; materialise trained_model first.")
    return ledger.version(assistant, job.fine_tuned_model)
