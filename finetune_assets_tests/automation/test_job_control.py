"""A person's hand on jobs from the Launchpad: what is done, what is shown, and what is refused in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from finetune_assets.automation.job_control import control_jobs
from finetune_assets.environment import Environment
from finetune_assets.errors import LedgerError, ProviderUnsettled, SettingsError, TrainingError
from finetune_assets.overview import cancel_job
from finetune_assets.registry import Job, Ledger
from finetune_assets.registry.remote_jobs import open_journal, remote_job
from finetune_assets.registry.spending import month
from finetune_assets.serving.cron import SECRET, cron_routes
from finetune_assets.storage import Store
from finetune_assets.training.openai_wire import OpenAIWire
from finetune_assets.training.remote import Connection
from finetune_assets.training.submission import bill, submit
from finetune_assets.training.trainer import Estimate
from finetune_assets.training.wire_submission import Submission
from finetune_assets_tests.training import fake_provider
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.fake_provider.process import KEY
from finetune_assets_tests.training.remote_request import assistant, dataset, request


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeProvider]:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with fake_provider.start() as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        yield running


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(f"sqlite:///{tmp_path / 'home' / 'ledger.db'}")
    yield made
    made.close()


def submitted(book: Ledger, home: Path) -> Job:
    settings = assistant()
    same: dict[str, Any] = {"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": "f1"}
    same |= {"provider": "openai", "base_model": settings.base_model, "hyperparameters": {}, "plan": {}, "spec_hash": "s"}
    job = book.open_job(same)
    journal = open_journal(book, job.id, Connection.of(settings).to_dict(), 72)
    asked = request(dataset(home / "frozen"), settings)
    trainer = OpenAIWire(Connection.of(settings), Store(home), journal)
    return submit(book, job, trainer, asked, bill(settings, asked, Estimate(9, False, None, 0.1, None), None, job.id))


def do(what: str, job: str = "") -> str:
    done = control_jobs.execute_in_process({"ops": {"control": {"config": {"do": what, "job": job}}}})
    return str(done.output_for_node("control"))


def test_a_hand_on_a_job(fake: FakeProvider, book: Ledger, tmp_path: Path) -> None:
    job = submitted(book, tmp_path / "home")
    assert do("list") == "1 jobs"
    assert do("pause", job.id) == f"{job.id}: paused"
    assert fake.jobs[0]["status"] == "paused"
    held = remote_job(book, job.id)
    assert held is not None
    assert (held.provider_status, held.progress["paused"]) == ("paused", True)  # shown at once, and its time counts no more
    assert do("resume", job.id) == f"{job.id}: validating_files"
    assert do("events", job.id) == "1 events"
    assert "is cancelled at openai" in do("cancel", job.id)
    assert (fake.jobs[0]["status"], book.job(job.id).status) == ("cancelled", "cancelled")
    assert "nothing to cancel" in do("cancel", job.id)
    for what, which, error, says in (
        ("stop", job.id, SettingsError, "none of list, events"),
        ("pause", "", SettingsError, "needs the id of a job"),
        ("pause", job.id, LedgerError, "is cancelled already; there is nothing to pause"),
        ("events", "job-none-1", LedgerError, "job-none-1"),
    ):
        with pytest.raises(error, match=says):
            do(what, which)


def test_a_job_that_was_not_submitted_yet_leaves_nothing(fake: FakeProvider, book: Ledger, tmp_path: Path) -> None:
    fake.fault("GET /files/ID", "error", status=500, times=3)
    with pytest.raises(ProviderUnsettled):
        submitted(book, tmp_path / "home")
    [job] = book.jobs()
    assert (len(fake.state()["files"]), len(month(book))) == (2, 1)
    assert cancel_job(Environment.read(), job.id) == f"{job.id} is cancelled; it had not been submitted."
    assert (fake.state()["files"], month(book), book.job(job.id).status) == ([], [], "cancelled")


@pytest.mark.parametrize("opened", [False, True])
def test_a_cancel_before_the_submission_is_begun_buys_nothing(
    fake: FakeProvider, book: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """The job is in the ledger, its journal is not; or is `opened` while somebody cancels."""
    opening, setting = open_journal, Ledger.set_job

    def cancelled_before(ledger: Ledger, job_id: str, *arguments: Any) -> Any:
        said.append(cancel_job(Environment.read(), job_id))
        return opening(ledger, job_id, *arguments)

    def opened_before(ledger: Ledger, job_id: str, status: str, **columns: Any) -> Job:
        if opened and not remote_job(ledger, job_id):
            opening(ledger, job_id, Connection.of(assistant()).to_dict(), 72)
        return setting(ledger, job_id, status, **columns)

    said: list[str] = []
    monkeypatch.setattr(Ledger, "set_job", opened_before)
    monkeypatch.setitem(globals(), "open_journal", cancelled_before)
    with pytest.raises(TrainingError, match="was cancelled before it was submitted; nothing was created"):
        submitted(book, tmp_path / "home")
    [job] = book.jobs()
    assert said == [f"{job.id} is cancelled; it had not been submitted."]
    assert (fake.jobs, fake.state()["files"], month(book), book.job(job.id).status) == ([], [], [], "cancelled")


@pytest.mark.parametrize("step", ["upload", "await_file"])
def test_a_cancel_during_the_upload_buys_nothing(
    fake: FakeProvider, book: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Somebody cancels after the first upload, or when all files are there."""
    said: list[str] = []
    real: Any = getattr(Submission, step)

    def then_cancelled(self: Submission, *arguments: Any) -> Any:
        done = real(self, *arguments)
        if not said:
            said.append(cancel_job(Environment.read(), book.jobs()[0].id))
        return done

    monkeypatch.setattr(Submission, step, then_cancelled)
    with pytest.raises(TrainingError):
        submitted(book, tmp_path / "home")
    [job] = book.jobs()
    assert said == [f"{job.id} is cancelled; it had not been submitted."]
    assert (fake.jobs, fake.state()["files"], month(book), book.job(job.id).status) == ([], [], [], "cancelled")


def test_a_cancel_that_comes_while_the_job_is_created_cancels_it_there(
    fake: FakeProvider, book: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Submission.create

    def then_cancelled(self: Submission, *arguments: Any) -> str:
        made = real(self, *arguments)
        assert "is cancelled at openai" in cancel_job(Environment.read(), book.jobs()[0].id)
        return made

    monkeypatch.setattr(Submission, "create", then_cancelled)
    assert submitted(book, tmp_path / "home").status == "cancelled"
    assert [one["status"] for one in fake.jobs] == ["cancelled"]


def test_what_was_paid_for_is_not_thrown_away_by_a_late_cancel(fake: FakeProvider, book: Ledger, tmp_path: Path) -> None:
    job = submitted(book, tmp_path / "home")
    fake.set(jobs={fake.jobs[0]["id"]: {"status": "succeeded", "fine_tuned_model": "ft:x"}})
    assert "has already succeeded at openai" in cancel_job(Environment.read(), job.id)
    assert book.job(job.id).status == "pending"  # the next tick takes its model


def test_a_scheduler_that_calls_an_address(
    fake: FakeProvider, book: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submitted(book, tmp_path / "home")
    client = TestClient(Starlette(routes=cron_routes(Environment.read(), book)))
    assert client.get("/cron/finetuning").status_code == 404  # no secret is set
    monkeypatch.setenv(SECRET, "a-long-secret")
    assert client.get("/cron/finetuning", headers={"Authorization": "Bearer another"}).status_code == 401
    told = client.post("/cron/finetuning", headers={"Authorization": "Bearer a-long-secret"}).json()
    assert (told["success"], told["checked"]) == (True, 1)
    assert (told["results"][0]["job"], told["results"][0]["provider_status"]) == (job.id, "validating_files")
    again = client.get("/cron/finetuning", headers={"Authorization": "Bearer a-long-secret"}).json()
    assert again == {"success": True, "checked": 0, "results": []}  # it was asked a moment ago
