"""A finished job is taken into phase two by one run, and by another one if that run died."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from finetune_assets.registry import Job, Ledger
from finetune_assets.resources.claims import MAX_ATTEMPTS, claim, cli_owner, owner_lives, waiting_jobs


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    book = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield book
    book.close()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def finished(ledger: Ledger) -> Job:
    columns = {
        "assistant": "dental",
        "tenant_id": None,
        "dataset_id": "ds-1",
        "dataset_fingerprint": "f" * 16,
        "provider": "local",
        "base_model": "data/base_model",
        "hyperparameters": {},
        "plan": {},
        "spec_hash": "s1",
    }
    return ledger.set_job(ledger.open_job(columns).id, "succeeded")


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_free_job_waits_and_is_claimed_once(ledger: Ledger, instance: dg.DagsterInstance) -> None:
    job = finished(ledger)
    assert [waiting.id for waiting in waiting_jobs(instance, ledger)] == [job.id]
    assert claim(instance, ledger, job, cli_owner())
    assert waiting_jobs(instance, ledger) == []  # this process lives
    assert not claim(instance, ledger, ledger.job(job.id), "run:other")
    assert claim(instance, ledger, ledger.job(job.id), cli_owner())  # again by the same owner


def test_a_dead_process_loses_its_claim(ledger: Ledger, instance: dg.DagsterInstance) -> None:
    job = finished(ledger)
    ledger.claim_release(job.id, f"cli:{socket.gethostname()}:{dead_process()}")
    assert [waiting.id for waiting in waiting_jobs(instance, ledger)] == [job.id]
    assert claim(instance, ledger, ledger.job(job.id), cli_owner())


def test_another_hosts_process_counts_as_living(instance: dg.DagsterInstance) -> None:
    assert owner_lives(instance, "cli:another-host:1")
    assert owner_lives(instance, f"cli:{socket.gethostname()}:{os.getpid()}")
    assert not owner_lives(instance, "run:00000000-0000-0000-0000-000000000000")
    assert not owner_lives(instance, None)


def test_tries_are_bounded(ledger: Ledger, instance: dg.DagsterInstance) -> None:
    job = finished(ledger)
    for attempt in range(MAX_ATTEMPTS):
        owner = ledger.job(job.id).released_by
        assert ledger.claim_release(job.id, f"run:{attempt}", owner)
    assert waiting_jobs(instance, ledger) == []
