"""Open jobs asked for at once, a provider that is away, jobs that are stuck or gone; and what each cost."""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from finetune_assets.automation.rented import poll_due
from finetune_assets.environment import Environment
from finetune_assets.errors import BudgetExceeded, ProviderError, ProviderUnsettled, SettingsError
from finetune_assets.overview import cancel_job
from finetune_assets.registry import Job, Ledger
from finetune_assets.registry.remote_jobs import LedgerJournal, due, open_journal, open_remote, remote_job
from finetune_assets.registry.spending import Limits, Purchase, month, reserve, settle, spent
from finetune_assets.registry.tables import now, remote_jobs
from finetune_assets.resources import StoreResource, TrainerResource
from finetune_assets.storage import Store
from finetune_assets.training import polling, prices
from finetune_assets.training.openai_wire import OpenAIWire
from finetune_assets.training.polling import Polled, poll
from finetune_assets.training.remote import Connection, Journal, RemoteTrainer
from finetune_assets.training.submission import bill, submit
from finetune_assets.training.trainer import Estimate, JobHandle
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.remote_request import assistant, dataset, request

RETRIEVE = "GET /fine_tuning/jobs/ID"


class World:
    """A ledger and a store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "home")
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        self.settings = assistant(remote={"max_hours": 2})

    def connect(self, connection: Connection, journal: Journal) -> RemoteTrainer:
        return OpenAIWire(connection, self.store, journal, settle_seconds=0.3)

    def open(self, key: str = "s", hours: float = 2, connection: dict[str, Any] | None = None) -> Job:
        columns: dict[str, Any] = {
            "assistant": "dental",
            "tenant_id": None,
            "dataset_id": "ds",
            "dataset_fingerprint": "f1",
            "provider": "openai",
            "base_model": "gpt-4o-mini-2024-07-18",
            "hyperparameters": {},
            "plan": {},
            "spec_hash": key,
        }
        job = self.ledger.open_job(columns)
        open_journal(self.ledger, job.id, connection or Connection.of(self.settings).to_dict(), hours)
        return job

    def submit(self, usd: float | None = 0.5) -> Job:
        job, asked = self.open(), request(dataset(self.folder / "frozen"), self.settings)
        estimate = Estimate(1000, False, None, usd, None)
        trainer = self.connect(Connection.of(self.settings), LedgerJournal(self.ledger, job.id))
        return submit(self.ledger, job, trainer, asked, bill(self.settings, asked, estimate, None, job.id))

    def poll(self, seconds: float = 30) -> list[Polled]:
        return poll(self.ledger, open_remote(self.ledger), self.connect, None, seconds)

    def past_deadline(self, minutes: float = 1) -> None:
        """Makes every job older than it may be."""
        with self.ledger.engine.begin() as connection:
            ago = now() - datetime.timedelta(minutes=minutes)
            connection.execute(sa.update(remote_jobs).values(deadline=ago, polled_at=now()))

    def cost(self, job: Job) -> tuple[float | None, bool]:
        """US dollars in the ledger, and whether that is the last word."""
        row = spent(self.ledger, job.id) or {}
        return row["usd"], row["final"]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.ledger.close()


def test_a_job_to_its_end(fake: FakeProvider, world: World) -> None:
    job = world.submit()
    assert (job.status, spent(world.ledger, job.id)["usd"]) == ("pending", 0.5)  # type: ignore[index]
    words = [world.poll()[0].provider_status for _ in range(3)]
    assert words == ["validating_files", "queued", "running"]
    remote = remote_job(world.ledger, job.id)
    assert remote is not None
    assert (remote.job.status, remote.progress["step"], remote.progress["train_loss"]) == ("running", 120, 0.4286)
    [ended] = world.poll()
    assert (ended.ended, ended.job.status) == (True, "succeeded")
    tokens = fake.jobs[0]["trained_tokens"]
    cost = spent(world.ledger, job.id) or {}
    assert (cost["final"], cost["usd"], ended.job.trained_tokens) == (True, pytest.approx(tokens * 3 / 1e6), tokens)
    assert fake.state()["files"] == []
    assert world.poll() == []


def test_clocks_that_disagree_decide_nothing(fake: FakeProvider, world: World) -> None:
    fake.set(clock=-400 * 86400)
    job = world.submit()
    for _ in range(4):
        world.poll()
    ended = world.ledger.job(job.id)
    assert ended.status == "succeeded"
    assert ended.completed_at is not None
    assert abs((ended.completed_at - datetime.datetime.now(datetime.UTC)).total_seconds()) < 60
    assert month(world.ledger)[0]["reference"] == job.id


def test_a_clock_that_jumps_stops_no_job(fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.set(progress=["running"])
    job = world.submit()
    monkeypatch.setattr(polling, "now", lambda: now() + datetime.timedelta(hours=30))
    assert "by that of openai 0.0, which is below remote.max_hours" in (world.poll()[0].note or "")
    assert (world.ledger.job(job.id).status, fake.jobs[0]["status"]) == ("running", "running")
    fake.set(jobs={fake.jobs[0]["id"]: {"created_at": int(time.time()) - 3 * 3600}})
    world.poll()
    assert fake.jobs[0]["status"] == "cancelled"


def test_answers_out_of_order_never_lead_back(fake: FakeProvider, world: World) -> None:
    job = world.submit()
    for word, ours in (("running", "running"), ("queued", "running"), ("dreaming", "running")):
        fake.set(forced={"*": {"status": word}})
        assert world.poll()[0].job.status == ours
    assert "dreaming" in (remote_job(world.ledger, job.id).note or "")  # type: ignore[union-attr]


def test_a_stuck_job_is_cancelled_and_says_so(fake: FakeProvider, world: World) -> None:
    job = world.submit()
    fake.set(progress=["validating_files", "queued"])
    world.past_deadline()
    [ended] = world.poll()
    assert ended.ended
    assert "stuck: still 'validating_files'" in (world.ledger.job(job.id).error or "")
    assert [one["status"] for one in fake.jobs] == ["cancelled"]
    assert world.cost(job) == (0.5, True)  # nobody says what it came to: the estimate stays
    assert fake.state()["files"] == []


def being_stopped(fake: FakeProvider, world: World) -> Job:
    """A job that was asked to stop, and has not stopped yet."""
    job = world.submit()
    fake.set(forced={"*": {"status": "running"}})
    world.past_deadline()
    for _ in range(2):
        [polled] = world.poll()
        assert (polled.ended, polled.job.status) == (False, "running")
        assert "so it was asked to stop at" in (polled.note or "")
    assert fake.state()["seen"].count("POST /fine_tuning/jobs/ID/cancel") == 1
    assert world.cost(job) == (0.5, False)
    return job


def test_a_job_that_was_done_when_it_was_asked_to_stop_is_not_lost(fake: FakeProvider, world: World) -> None:
    job = being_stopped(fake, world)
    done = {"status": "succeeded", "fine_tuned_model": "ft:gpt-4o-mini-2024-07-18:org::1", "trained_tokens": 1000}
    fake.set(forced={"*": done})
    [ended] = world.poll()
    assert (ended.ended, ended.job.status, world.cost(job)) == (True, "succeeded", (pytest.approx(0.003), True))


def test_a_job_that_stops_late_has_its_cost(fake: FakeProvider, world: World) -> None:
    job = being_stopped(fake, world)
    fake.set(forced={"*": {"status": "cancelled", "trained_tokens": 500}})
    [ended] = world.poll()
    assert (ended.ended, ended.job.status, world.cost(job)) == (True, "failed", (pytest.approx(0.0015), True))
    assert "stuck: still 'running' after 0 hours (remote.max_hours), so it was cancelled" in (ended.job.error or "")


def test_a_job_that_does_not_stop_is_left_to_a_person(fake: FakeProvider, world: World) -> None:
    job = being_stopped(fake, world)
    LedgerJournal(world.ledger, job.id).save(stop={"asked": "2026-11-01 10:00:00", "was": "queued"})
    [ended] = world.poll()
    error = ended.job.error or ""
    assert (ended.ended, ended.job.status, world.cost(job)) == (True, "failed", (0.5, True))
    assert f"it still is 'running': look at openai for {fake.jobs[0]['id']}, it may still run and cost" in error


def test_a_provider_that_is_away_at_the_deadline(fake: FakeProvider, world: World) -> None:
    job = world.submit()
    world.poll()
    fake.fault(RETRIEVE, "error", status=500, times=4)
    world.past_deadline()
    assert [world.poll()[0].ended for _ in range(3)] == [False] * 3  # it may be back within the hour
    world.past_deadline(minutes=61)
    assert world.poll()[0].ended
    error = world.ledger.job(job.id).error or ""
    assert "does not say what became of it" in error
    assert fake.jobs[0]["id"] in error  # it may still run: a person has to look
    assert world.cost(job) == (0.5, True)
    assert fake.state()["files"] == []


def test_a_key_that_is_gone_at_the_deadline(fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.submit()
    world.poll()
    world.past_deadline(minutes=61)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert [world.poll()[0].ended for _ in range(3)] == [False, False, True]
    assert "OPENAI_API_KEY" in (world.ledger.job(job.id).error or "")
    assert world.cost(job) == (0.5, True)


def test_a_job_that_was_never_submitted_ends_at_its_deadline(fake: FakeProvider, world: World) -> None:
    fake.fault("GET /files/ID", "error", status=500, times=3)  # both files are there, whether they are fit is not known
    with pytest.raises(ProviderUnsettled):
        world.submit()
    [job] = world.ledger.jobs()
    assert (world.poll()[0].provider_status, len(fake.state()["files"])) == ("not submitted", 2)
    world.past_deadline()
    [ended] = world.poll()
    assert (ended.ended, fake.state()["files"]) == (True, [])
    assert "never submitted: it was not submitted yet after" in (world.ledger.job(job.id).error or "")
    assert world.cost(job) == (0.0, True)
    again = world.submit()  # and whoever starts it again has a new deadline
    assert (again.attempt, world.poll()[0].provider_status) == (2, "validating_files")


def test_who_goes_on_with_a_submission_has_a_new_deadline(fake: FakeProvider, world: World) -> None:
    fake.fault("GET /files/ID", "error", status=500, times=3)
    with pytest.raises(ProviderUnsettled):
        world.submit()
    world.past_deadline()
    job = world.submit()
    assert (job.attempt, world.poll()[0].provider_status) == (1, "validating_files")


def test_a_pause_does_not_count(fake: FakeProvider, world: World) -> None:
    fake.set(progress=["running"])
    job = world.submit()
    fake.set(forced={"*": {"status": "paused"}})
    world.poll()
    for hours in (30, 40):  # nobody asked for so long, and it was paused all the while
        remote = remote_job(world.ledger, job.id)
        assert remote is not None
        ago = {
            "polled_at": now() - datetime.timedelta(hours=hours),
            "deadline": remote.deadline - datetime.timedelta(hours=hours),
        }
        with world.ledger.engine.begin() as connection:
            connection.execute(sa.update(remote_jobs).values(ago))
        assert world.poll()[0].provider_status == "paused"
    fake.set(forced={})
    assert world.poll()[0].job.status == "running"
    assert fake.jobs[0]["status"] != "cancelled"
    world.past_deadline()
    assert world.poll()[0].ended  # from here on it counts


def test_a_provider_that_is_away_is_asked_less_often(fake: FakeProvider, world: World) -> None:
    job = world.submit()
    waits: list[float] = []
    for _ in range(4):
        fake.fault(RETRIEVE, "error", status=500)  # asked once: the next tick asks again
        [polled] = world.poll()
        assert (polled.job.status, polled.ended) == ("pending", False)
        with world.ledger.engine.connect() as connection:
            at = connection.execute(sa.select(remote_jobs.c.next_poll_at)).scalar_one()
        waits.append((at - now()).total_seconds())
    assert waits == sorted(waits)
    assert waits[-1] > 4 * 60
    assert fake.state()["seen"].count(RETRIEVE) == 4
    assert due(world.ledger, now()) == []
    assert "500" in (remote_job(world.ledger, job.id).note or "")  # type: ignore[union-attr]
    assert world.poll()[0].note is None  # it is back


def test_a_job_that_the_provider_does_not_know_any_more(fake: FakeProvider, world: World) -> None:
    job = world.submit()
    fake.fault(RETRIEVE, "error", status=404, code="fine_tune_not_found", message="no such job", times=5)
    assert [world.poll()[0].ended for _ in range(4)] == [False] * 4
    journal = LedgerJournal(world.ledger, job.id)
    hour_ago = datetime.datetime.fromisoformat(journal.load()["missing_since"]) - polling.GONE
    journal.save(missing_since=str(hour_ago))
    assert world.poll()[0].ended
    assert "knows the job no more" in (world.ledger.job(job.id).error or "")
    assert world.cost(job) == (0.5, True)
    assert fake.state()["files"] == []


def test_a_deployment_that_never_answers_is_given_up_and_the_model_comes_home(fake: FakeProvider, world: World) -> None:
    made = world.folder / "made"
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    fake.set(checkpoint=str(made), never_active=True, progress=["running", "succeeded"])
    world.settings = assistant("nebius", remote={"base_url": fake.url, "deploy": True})
    job = world.submit()
    assert [world.poll()[0].provider_status for _ in range(3)] == ["running", *["Deploying (validating)"] * 2]
    world.past_deadline()
    [ended] = world.poll()
    assert (ended.job.status, "given up while it was validating" in (ended.note or "")) == ("succeeded", True)
    trainer = world.connect(Connection.of(world.settings), LedgerJournal(world.ledger, job.id))
    trainer.keep(JobHandle("nebius", fake.jobs[0]["id"], job.id, "f1"), world.folder / "kept", {"base_model": "b"})
    assert (world.folder / "kept" / "model" / "adapter_config.json").exists()


def test_files_that_could_not_be_deleted_are_deleted_later(fake: FakeProvider, world: World) -> None:
    job = world.submit()
    error = {"code": "invalid_training_file", "message": "bad", "param": None}
    fake.set(jobs={fake.jobs[0]["id"]: {"status": "failed", "error": error}})
    fake.fault("DELETE /files/ID", "error", status=500, times=4)  # both files, twice
    assert world.poll()[0].ended
    assert len(fake.state()["files"]) == 2
    assert world.ledger.job(job.id).status == "failed"

    def later() -> str | None:
        with world.ledger.engine.begin() as connection:
            connection.execute(sa.update(remote_jobs).values(next_poll_at=now()))
        poll_due(world.ledger, StoreResource(home=str(world.folder / "home")), TrainerResource())
        return remote_job(world.ledger, job.id).note  # type: ignore[union-attr]

    assert "deleting file" in (later() or "")
    assert later() is None
    seen = len(fake.state()["seen"])
    assert (fake.state()["files"], later(), len(fake.state()["seen"])) == ([], None, seen)


def test_404_of_the_list_or_the_events_is_not_the_jobs(fake: FakeProvider, world: World) -> None:
    job = world.submit()
    journal = LedgerJournal(world.ledger, job.id)
    journal.save(provider_job_id=None, missing=99, missing_since="2026-01-01 00:00:00")
    fake.fault("GET /fine_tuning/jobs", "error", status=404, times=1)
    assert (world.poll()[0].ended, journal.load()["missing"]) == (False, 0)
    assert not world.poll()[0].ended
    assert journal.load()["provider_job_id"] == fake.jobs[0]["id"]


def test_404_counts_only_in_a_row(fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "GONE", datetime.timedelta())
    world.submit()
    for status in (404, 404, 500, 404, 404, None, 404):
        if status is not None:
            fake.fault(RETRIEVE, "error", status=status, message="ask again, 404 of us are busy")
        assert not world.poll()[0].ended


def test_a_failed_job_costs_nothing_before_it_ran_and_nobody_knows_what_afterwards(fake: FakeProvider, world: World) -> None:
    failed = {"status": "failed", "error": {"code": "invalid_training_file", "message": "bad", "param": None}}
    first = world.submit()
    fake.set(jobs={fake.jobs[0]["id"]: failed})
    assert world.poll()[0].ended
    assert world.cost(first) == (0.0, True)
    fake.set(progress=["queued", "running"])
    second = world.submit()
    for _ in range(2):
        world.poll()
    fake.set(jobs={fake.jobs[1]["id"]: failed})
    assert world.poll()[0].ended
    assert (world.ledger.job(second.id).status, world.cost(second)) == ("failed", (0.5, True))


def test_a_list_that_lags_hides_the_second_job_only_for_a_while(fake: FakeProvider, world: World) -> None:
    fake.set(list_lag=4.0, progress=["validating_files", "queued"])
    fake.fault("POST /fine_tuning/jobs", "error_after", status=500)  # it was created, and is not listed yet
    job = world.submit()
    assert [one["status"] for one in fake.jobs] == ["validating_files"] * 2
    world.poll()  # the first question: the list is still silent
    fake.set(list_lag=0.0)
    world.poll()
    assert sorted(one["status"] for one in fake.jobs) == ["cancelled", "queued"]
    kept = next(one for one in fake.jobs if one["status"] != "cancelled")
    assert world.ledger.job(job.id).provider_job_id == kept["id"] == fake.jobs[0]["id"]
    with world.ledger.engine.begin() as connection:
        state = {**LedgerJournal(world.ledger, job.id).load(), "create_started": "2026-01-01T00:00:00+00:00"}
        connection.execute(sa.update(remote_jobs).values(state=state))
    world.poll()
    before = fake.state()["seen"].count("GET /fine_tuning/jobs")
    world.poll()
    assert fake.state()["seen"].count("GET /fine_tuning/jobs") == before  # ten minutes later nothing is in doubt


def doubtful(fake: FakeProvider, world: World) -> tuple[Job, list[str]]:
    """A job whose first creation was not answered, which the list does not show yet; the ids of both."""
    fake.set(list_lag=600.0, progress=["running"])
    fake.fault("POST /fine_tuning/jobs", "error_after", status=500)
    return world.submit(), [one["id"] for one in fake.jobs]


def long_ago(world: World, job: Job) -> None:
    LedgerJournal(world.ledger, job.id).save(create_started="2026-01-01T00:00:00+00:00")


def test_a_cancelled_job_is_over_when_its_second_one_is_too(fake: FakeProvider, world: World) -> None:
    job, _ = doubtful(fake, world)
    place = {"FINETUNE_HOME": str(world.store.home), "FINETUNE_DATABASE_URL": str(world.ledger.engine.url)}
    environment = Environment.read(place)
    assert "look for a second job first, and stop it" in cancel_job(environment, job.id)
    world.poll()
    assert [one["status"] for one in fake.jobs] == ["running", "cancelled"]
    fake.set(list_lag=0.0)
    for _ in range(2):  # found and stopped, and still looked for
        assert world.poll()[0].job.status == "pending"
    assert [one["status"] for one in fake.jobs] == ["cancelled", "cancelled"]
    long_ago(world, job)
    assert [(one.ended, one.job.status) for one in world.poll()] == [(True, "cancelled")]


@pytest.mark.parametrize("status", ["failed", "succeeded"])
def test_a_job_that_ends_at_once_hides_no_second_one(fake: FakeProvider, world: World, status: str) -> None:
    job, (first, second) = doubtful(fake, world)
    fake.set(jobs={second: {"status": status, "fine_tuned_model": "ft:x", "error": {"code": "x", "message": "y", "param": None}}})
    [polled] = world.poll()
    assert (polled.ended, "a second job is looked for" in str(polled.note)) == (False, True)
    fake.set(list_lag=0.0)
    world.poll()
    kept, states = (first, "running") if status == "failed" else (second, "cancelled"), fake.jobs
    assert (world.ledger.job(job.id).provider_job_id, states[0]["status"]) == kept
    long_ago(world, job)
    assert world.poll()[0].ended == (status == "succeeded")


def test_a_key_that_may_not_list_stops_no_question(fake: FakeProvider, world: World) -> None:
    job, _ = doubtful(fake, world)
    fake.fault("GET /fine_tuning/jobs", "error", status=403, times=3)
    assert (world.poll()[0].provider_status, world.poll()[0].note) == ("running", None)
    long_ago(world, job)
    world.poll()
    assert not LedgerJournal(world.ledger, job.id).load()["doubtful"]


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_a_provider_that_hangs_holds_up_neither_the_tick_nor_the_others(
    fake: FakeProvider, world: World, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "REQUEST_SECONDS", 0.5)
    first = world.submit()
    known = LedgerJournal(world.ledger, first.id).load()
    away = Connection.of(assistant(remote={"base_url": silent})).to_dict()
    for number in range(30):
        job = world.open(f"s{number}", connection=away)
        LedgerJournal(world.ledger, job.id).save(**{**known, "run_key": job.id})
    with world.ledger.engine.begin() as connection:  # the one that answers is the last one
        others = remote_jobs.c.job_id != first.id
        connection.execute(sa.update(remote_jobs).where(others).values(next_poll_at=now() - datetime.timedelta(hours=1)))
    begun = time.monotonic()
    polled = world.poll(seconds=20)
    assert time.monotonic() - begun < 8
    by_job = {one.job.id: one for one in polled}
    assert len(by_job) == 31
    assert (by_job[first.id].provider_status, by_job[first.id].reached) == ("validating_files", True)
    alone = [one for one in polled if not one.reached]
    assert len(alone) >= 20
    assert alone[0].note == "not asked: openai is busy or away"
    assert due(world.ledger, now()) == []  # they wait, too


def test_what_there_was_no_time_for_comes_first_in_the_next_tick(
    fake: FakeProvider, world: World, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "REQUEST_SECONDS", 2.0)
    monkeypatch.setattr(polling, "THREADS", 1)
    last = world.submit()
    known = LedgerJournal(world.ledger, last.id).load()
    stuck = world.open("hangs", connection=Connection.of(assistant(remote={"base_url": silent})).to_dict())
    LedgerJournal(world.ledger, stuck.id).save(**{**known, "run_key": stuck.id})
    with world.ledger.engine.begin() as connection:
        first = remote_jobs.c.job_id == stuck.id
        connection.execute(sa.update(remote_jobs).where(first).values(next_poll_at=now() - datetime.timedelta(hours=1)))
    begun = time.monotonic()
    hung, left = world.poll(seconds=0.5)
    assert time.monotonic() - begun < 1.9
    assert (hung.job.id, hung.note) == (stuck.id, "no answer in 0 s")
    assert (left.job.id, left.reached) == (last.id, False)
    assert [one.job.id for one in due(world.ledger, now())] == [last.id]


def test_too_many_requests_leave_the_provider_alone_for_as_long_as_it_says(fake: FakeProvider, world: World) -> None:
    first = world.submit()
    known = LedgerJournal(world.ledger, first.id).load()
    for number in range(20):
        job = world.open(f"s{number}")
        LedgerJournal(world.ledger, job.id).save(**{**known, "run_key": job.id})
    fake.fault(RETRIEVE, "error", status=429, code="rate_limit_exceeded", times=99, retry_after=600)
    assert len(world.poll()) == 21
    assert fake.state()["seen"].count(RETRIEVE) <= polling.THREADS
    assert due(world.ledger, now() + datetime.timedelta(seconds=590)) == []


def test_an_answer_that_nobody_expected_is_one_jobs_own(
    fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.submit()
    monkeypatch.setattr(OpenAIWire, "poll", lambda *_: {}["status"])
    [polled] = world.poll()
    assert (polled.ended, "nobody expected (KeyError: 'status')" in (polled.note or "")) == (False, True)


def test_a_job_that_nobody_wrote_down_is_found(fake: FakeProvider, world: World) -> None:
    job = world.submit()
    with world.ledger.engine.begin() as connection:  # killed between the provider's answer and the ledger
        state = {**LedgerJournal(world.ledger, job.id).load(), "provider_job_id": None}
        connection.execute(sa.update(remote_jobs).values(state=state))
    [polled] = world.poll()
    assert polled.provider_status == "validating_files"
    assert world.ledger.job(job.id).provider_job_id == fake.jobs[0]["id"]


def test_a_plain_no_reserves_nothing_and_the_next_attempt_is_new(fake: FakeProvider, world: World) -> None:
    fake.fault("POST /fine_tuning/jobs", "error", status=403, code="x", message="not any more")
    with pytest.raises(ProviderError, match="not any more"):
        world.submit()
    assert [job.status for job in world.ledger.jobs()] == ["failed"]
    assert month(world.ledger) == []
    assert fake.state()["files"] == []  # nobody needs them any more
    assert world.submit().attempt == 2


def test_unsettled_keeps_job_and_reservation(fake: FakeProvider, world: World) -> None:
    fake.fault("POST /fine_tuning/jobs", "drop_before", times=3)
    with pytest.raises(ProviderUnsettled, match="run the same again"):
        world.submit()
    [job] = world.ledger.jobs()
    assert (job.status, len(month(world.ledger))) == ("pending", 1)
    assert world.submit().id == job.id
    assert len(fake.jobs) == 1


# money


def purchase(reference: str, usd: float | None, name: str = "dental") -> Purchase:
    return Purchase(reference, name, "openai", "training", usd, 10, "Add it to prices.yaml.")


def test_a_month_is_held_against_its_limits(world: World) -> None:
    limits = Limits(assistant=10, project=15)
    reserve(world.ledger, purchase("a", 6), limits)
    reserve(world.ledger, purchase("a", 6), limits)  # the same one again
    with pytest.raises(BudgetExceeded, match=r"about \$5\.00; dental has spent.*\$6\.00.*\$1\.00 above budget\.monthly_usd"):
        reserve(world.ledger, purchase("b", 5), limits)
    settle(world.ledger, "a", 4.5)
    reserve(world.ledger, purchase("b", 5), limits)
    with pytest.raises(BudgetExceeded, match=r"\$0\.50 above FINETUNE_MONTHLY_USD"):
        reserve(world.ledger, purchase("c", 6, "resting"), limits)
    with pytest.raises(SettingsError, match=r"budget\.monthly_usd is 10, but nothing says.*prices\.yaml"):
        reserve(world.ledger, purchase("d", None), limits)
    assert sorted(row["reference"] for row in month(world.ledger)) == ["a", "b"]
    reserve(world.ledger, purchase("e", 1000), Limits())


def test_the_bill_of_one_training(world: World) -> None:
    rich = assistant(budget={"training_usd": 2.0})
    asked = request(dataset(world.folder / "frozen"), rich)
    with pytest.raises(BudgetExceeded, match=r"about \$3\.25, \$1\.25 above budget\.training_usd"):
        bill(rich, asked, Estimate(1, False, None, 3.25, None), None, "")
    with pytest.raises(SettingsError, match=r"prices\.yaml"):
        bill(rich, asked, Estimate(1, False, None, None, None), None, "")


def test_a_users_table_goes_before_the_shipped_one(tmp_path: Path) -> None:
    shipped = prices.find("openai", "ft:gpt-4o-mini-2024-07-18:org::x")
    assert shipped is not None
    assert (shipped.of_training(1_000_000), shipped.of_reply(1000, 100), shipped.date.year) == (3.0, 0.00021, 2024)
    (tmp_path / "prices.yaml").write_text(
        "- {provider: openai, model: gpt-4o-mini, training: 25, source: a bill, date: 2026-11-01}\n"
    )
    own = prices.find("openai", "gpt-4o-mini-2024-07-18", tmp_path)
    assert own is not None
    assert (own.training, own.source, own.of_reply(1, 1)) == (25, "a bill", None)
    assert prices.find("openai", "gpt-99", tmp_path) is None
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "prices.yaml").write_text("- {provider: openai, prize: 3}\n")
    with pytest.raises(SettingsError, match=r"prices\.yaml is no table of prices"):
        prices.find("openai", "gpt-4o-mini", tmp_path / "broken")


def test_no_key_in_the_note_of_an_unexpected_answer(fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "un4usual~shape")
    job = world.open()
    LedgerJournal(world.ledger, job.id).save(provider_job_id="ftjob-1")

    def odd(self: OpenAIWire, handle: JobHandle) -> None:
        raise ValueError("Illegal header value b'un4usual~shape'")

    monkeypatch.setattr(OpenAIWire, "poll", odd)
    note = world.poll()[0].note or ""
    assert ("ValueError: Illegal header value" in note, "un4usual" in note) == (True, False)
