"""Who takes a finished job into phase two: exactly one run, and another one if that run died.

A claim names its owner, `run:<run id>` or `cli:<host>:<pid>`; a claim whose owner is gone may be taken over.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import dagster as dg

from finetune_assets.registry import Job, Ledger

MAX_ATTEMPTS = 3
ENDED_BADLY = (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


def cli_owner() -> str:
    """The claim of this process."""
    return f"cli:{socket.gethostname()}:{os.getpid()}"


def waiting_jobs(instance: dg.DagsterInstance, ledger: Ledger) -> list[Job]:
    """Succeeded jobs without a finished phase two and without a living owner, oldest first, tried less than three times."""
    jobs = [job for job in ledger.unreleased() if job.release_attempt < MAX_ATTEMPTS]
    return [job for job in jobs if not owner_lives(instance, job.released_by)]


def claim(instance: dg.DagsterInstance, ledger: Ledger, job: Job, owner: str) -> bool:
    """Claims phase two of a job; true if it is ours, because it was free, already ours, or its owner is gone."""
    if job.released_by == owner:
        return True
    return not owner_lives(instance, job.released_by) and ledger.claim_release(job.id, owner, job.released_by)


def owner_lives(instance: dg.DagsterInstance, owner: str | None) -> bool:
    """Whether the owner of a claim can still finish it; a process of another host counts as living."""
    if owner is None:
        return False
    kind, _, rest = owner.partition(":")
    if kind == "cli":
        host, _, pid = rest.rpartition(":")
        return host != socket.gethostname() or is_process(int(pid))
    run = instance.get_run_by_id(rest)
    return run is not None and not run.is_finished


def is_process(pid: int) -> bool:
    """Whether a process of this machine has this id."""
    return Path(f"/proc/{pid}").exists() if Path("/proc/self").exists() else _signals(pid)


def _signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
