"""What stands in the way of the next job: an earlier one that may still run at its provider, or one whose model is gone."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from finetune_assets.assets.remote import Plan, check_remote, keep_remote, submit_remote
from finetune_assets.automation.rented import poll_due
from finetune_assets.environment import Environment
from finetune_assets.errors import TrainingError
from finetune_assets.overview import cancel_job
from finetune_assets.registry import Job, Ledger
from finetune_assets.registry.remote_jobs import LedgerJournal
from finetune_assets.registry.spending import spent
from finetune_assets.registry.tables import now, remote_jobs
from finetune_assets.resources import AssistantsResource, LedgerResource, StoreResource, TrainerResource
from finetune_assets.storage import write_json
from finetune_assets.training.migration import retarget
from finetune_assets.training.remote import RemoteModel
from finetune_assets.training.trainer import Estimate
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.remote_request import assistant, dataset, request


class World:
    """What `training_plan`, `training_job` and `trained_model` do for one assistant, without their runs."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'ledger.db'}"
        self.book, self.store, self.trainer = Ledger(self.url), StoreResource(home=str(folder / "home")), TrainerResource()
        self.frozen = dataset(folder / "frozen")
        write_json(self.frozen / "manifest.json", {"counts": {"tenant": {}}})
        (folder / "assistants").mkdir()
        self.assistants = AssistantsResource(folder=str(folder / "assistants"))

    def buy(self, to: str | None = None, **settings: Any) -> Job:
        chosen = retarget(assistant(**settings), to) if to else assistant(**settings)
        asked, estimate = request(self.frozen, chosen), Estimate(1000, False, None, 0.5, None)
        spec = self.trainer.of(chosen, self.store.store, lambda _spec, _output: None).spec_hash(asked)
        plan = Plan(asked, estimate, spec)
        check_remote(self.assistants, self.store, LedgerResource(url=self.url), self.trainer, chosen, plan)
        columns: dict[str, Any] = {"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": "f1f1f1"}
        columns |= {"provider": chosen.trainer, "base_model": chosen.base_model, "hyperparameters": {}, "spec_hash": spec}
        job = self.book.open_job({**columns, "plan": asdict(estimate)})
        return submit_remote(self.trainer, self.store, self.book, chosen, asked, job)

    def poll(self, job: Job) -> Job:
        poll_due(self.book, self.store, self.trainer, job.id)
        return self.book.job(job.id)

    def finish(self, job: Job) -> Job:
        while (job := self.poll(job)).status in ("pending", "running"):
            pass
        return job

    def past_deadline(self, job: Job) -> None:
        ago = {"deadline": now() - datetime.timedelta(hours=1), "polled_at": now()}
        with self.book.engine.begin() as connection:
            connection.execute(sa.update(remote_jobs).where(remote_jobs.c.job_id == job.id).values(ago))

    def give_up(self, job: Job) -> None:
        """It was asked to stop at its deadline, long ago, and runs on."""
        self.book.set_job(job.id, "running")
        self.past_deadline(job)
        LedgerJournal(self.book, job.id).save(stop={"asked": "2026-11-01 10:00:00", "was": "running"})
        assert self.poll(job).status == "failed"

    def adrift(self, fake: FakeProvider) -> Job:
        fake.set(progress=["running"])
        job = self.buy()
        self.give_up(job)
        return job


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(tmp_path)
    for name, value in (("HOME", made.store.home), ("DATABASE_URL", made.url)):
        monkeypatch.setenv(f"FINETUNE_{name}", value)
    yield made
    made.book.close()


def epochs(number: int) -> dict[str, Any]:
    """Settings of another job."""
    return {"hyperparameters": {"epochs": number}}


def test_a_job_that_may_still_run_stops_the_next_one(fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_COMPATIBLE_BASE_URL", fake.url)
    job = world.adrift(fake)
    its = fake.jobs[0]["id"]
    with pytest.raises(TrainingError, match=rf"{job.id} of dental may still run at openai \({its}, running\).*cancel {job.id}`"):
        world.buy(**epochs(1))
    fake.fault("GET /fine_tuning/jobs/ID", "error", status=500)
    with pytest.raises(TrainingError, match=rf"unknown: openai: asking for job {its}.*jobs cancel {job.id} --ended"):
        world.buy(**epochs(1))
    assert world.buy("openai_compatible/open/small-7b").provider == "openai_compatible"  # free to leave
    fake.set(forced={"*": {"status": "running"}})
    assert f"asked to stop and still is 'running' at openai ({its})" in cancel_job(Environment.read(), job.id)
    fake.set(forced={})
    assert cancel_job(Environment.read(), job.id) == f"{job.id} has ended at openai ({its})."
    world.buy(**epochs(1))
    assert [one["status"] for one in fake.jobs] == ["cancelled", "running", "running"]


def test_a_creation_that_was_not_answered_and_that_a_list_shows_late(fake: FakeProvider, world: World) -> None:
    fake.set(list_lag=600, progress=["running"])
    job = world.buy()
    LedgerJournal(world.book, job.id).save(provider_job_id=None)
    world.past_deadline(job)
    assert (world.poll(job).status, len(fake.jobs)) == ("failed", 1)
    fake.set(list_lag=0)
    with pytest.raises(TrainingError, match=rf"{job.id} of dental may still run at openai"):
        world.buy(**epochs(1))


NOWHERE = "http://127.0.0.1:9/v1"


def test_a_job_is_asked_for_where_it_was_bought(fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address came from a variable, which says another one now."""
    job = world.buy()
    monkeypatch.setenv("OPENAI_BASE_URL", NOWHERE)
    job = world.finish(job)
    keep_remote(world.trainer, world.store, world.book, job)
    kept = RemoteModel.read(world.store.store.job(job.spec_hash) / "model")
    assert (job.status, kept.base_url if kept else None) == ("succeeded", fake.url)
    assert world.buy().id == job.id  # the hash has no address that a variable gives


def test_a_creation_is_looked_for_where_it_was_begun(fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.buy()
    LedgerJournal(world.book, job.id).save(provider_job_id=None, create_started="2026-01-01T00:00:00+00:00")
    monkeypatch.setenv("OPENAI_BASE_URL", NOWHERE)
    assert world.buy().provider_job_id == fake.jobs[0]["id"]
    assert len(fake.jobs) == 1


def test_a_person_may_know_better_than_the_provider(fake: FakeProvider, world: World) -> None:
    job = world.adrift(fake)
    assert "is taken as ended at openai" in cancel_job(Environment.read(), job.id, ended=True)
    world.buy(**epochs(1))
    assert "nothing to cancel" in cancel_job(Environment.read(), job.id)


def test_what_became_of_it_is_settled_or_taken(fake: FakeProvider, world: World) -> None:
    job = world.adrift(fake)
    fake.set(forced={"*": {"status": "cancelled", "trained_tokens": 500}})
    world.buy(**epochs(1))
    row = spent(world.book, job.id) or {}
    assert (row["usd"], row["final"], world.book.job(job.id).status) == (pytest.approx(0.0015), True, "failed")

    fake.set(forced={"*": {"status": "running"}})
    world.give_up(job)
    fake.set(forced={"*": {"status": "succeeded", "fine_tuned_model": "ft:x", "trained_tokens": 1000}})
    assert world.buy().id == job.id  # it has ended well after all: paid, so it is taken, and nothing new is bought
    assert (world.finish(job).status, len(fake.jobs)) == ("succeeded", 2)


def test_one_that_the_provider_does_not_know_stops_nobody(fake: FakeProvider, world: World) -> None:
    world.adrift(fake)
    fake.fault("GET /fine_tuning/jobs/ID", "error", status=404, code="fine_tune_not_found", message="no such job")
    world.buy(**epochs(1))
    assert len(fake.jobs) == 2


def test_what_the_error_of_a_model_that_is_gone_advises_works(
    fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep: Any = partial(keep_remote, world.trainer, world.store, world.book)
    gone = world.finish(world.buy())
    fake.forget_model(fake.jobs[0]["fine_tuned_model"])
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"its model is gone.*another hyperparameters\.seed.*finetune migrate"):
            keep(gone)
        assert (world.buy().id, len(fake.jobs)) == (gone.id, 1)  # the same settings are the same job
    again = world.finish(world.buy(hyperparameters={"seed": 7}))
    keep(again)
    assert (len(fake.jobs), (world.store.store.job(again.spec_hash) / "result.json").exists()) == (2, True)
    monkeypatch.setenv("OPENAI_COMPATIBLE_BASE_URL", fake.url)
    world.buy("openai_compatible/open/small-7b")
    assert (len(fake.jobs), fake.jobs[-1]["model"]) == (3, "open/small-7b")
