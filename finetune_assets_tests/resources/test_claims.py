"""A finished job is taken into phase two by one run, and by another one if that run died."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from finetune_assets.errors import LedgerError
from finetune_assets.registry import Job, Ledger
from finetune_assets.resources.claims import MAX_ATTEMPTS, claim, cli_owner, current_job, owner_lives, run_lock, waiting_jobs
from finetune_assets.resources.tags import JOB
from finetune_assets.storage import Store, write_json


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    book = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield book
    book.close()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def finished(ledger: Ledger, name: str = "s1") -> Job:
    columns = {
        "assistant": "dental",
        "tenant_id": None,
        "dataset_id": "ds-1",
        "dataset_fingerprint": "f" * 16,
        "provider": "local",
        "base_model": "data/base_model",
        "hyperparameters": {},
        "plan": {},
        "spec_hash": name,
    }
    return ledger.set_job(ledger.open_job(columns).id, "succeeded")


def test_a_free_job_waits_and_is_claimed_once(ledger: Ledger, instance: dg.DagsterInstance, tmp_path: Path) -> None:
    job = finished(ledger)
    assert [waiting.id for waiting in waiting_jobs(instance, ledger, tmp_path)] == [job.id]
    assert claim(instance, ledger, job, cli_owner(), tmp_path)
    assert waiting_jobs(instance, ledger, tmp_path) == []  # this process lives
    assert not claim(instance, ledger, ledger.job(job.id), "run:other", tmp_path)
    assert claim(instance, ledger, ledger.job(job.id), cli_owner(), tmp_path)  # again by the same owner


def test_a_command_line_loses_its_claim_when_nobody_holds_the_store(
    ledger: Ledger, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    job = finished(ledger)
    ledger.claim_release(job.id, "cli:a-container-that-is-gone:1")
    with run_lock(tmp_path):
        assert waiting_jobs(instance, ledger, tmp_path) == []
        assert not claim(instance, ledger, ledger.job(job.id), "run:other", tmp_path)
    assert [waiting.id for waiting in waiting_jobs(instance, ledger, tmp_path)] == [job.id]
    with run_lock(tmp_path):  # the next command line holds the store itself, so the other one is dead
        assert claim(instance, ledger, ledger.job(job.id), cli_owner(), tmp_path)


def test_a_run_lives_while_dagster_says_so(ledger: Ledger, instance: dg.DagsterInstance, tmp_path: Path) -> None:
    run = dg.DagsterRun(job_name="release", status=dg.DagsterRunStatus.STARTED, tags={})
    instance.add_run(run)
    assert owner_lives(instance, f"run:{run.run_id}", tmp_path)
    instance.report_run_failed(run)
    assert not owner_lives(instance, f"run:{run.run_id}", tmp_path)
    assert not owner_lives(instance, "run:00000000-0000-0000-0000-000000000000", tmp_path)
    assert not owner_lives(instance, None, tmp_path)


def test_tries_are_bounded(ledger: Ledger, instance: dg.DagsterInstance, tmp_path: Path) -> None:
    job = finished(ledger)
    for attempt in range(MAX_ATTEMPTS):
        owner = ledger.job(job.id).released_by
        assert ledger.claim_release(job.id, f"run:{attempt}", owner)
    assert waiting_jobs(instance, ledger, tmp_path) == []


def test_phase_two_takes_the_job_of_the_newest_plan(ledger: Ledger, tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(LedgerError, match="no finished training job"):
        current_job(store, ledger, "dental", {})
    old, new = finished(ledger, "s1"), finished(ledger, "s2")
    assert current_job(store, ledger, "dental", {}).id == new.id
    write_json(store.plan("dental"), {"spec_hash": "s1"})  # the settings went back to what they were
    assert current_job(store, ledger, "dental", {}).id == old.id
    assert current_job(store, ledger, "dental", {JOB: new.id}).id == new.id
