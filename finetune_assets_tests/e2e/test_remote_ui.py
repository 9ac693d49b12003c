"""A rented trainer in the UI: runs that end while their jobs go on, a worker that is free meanwhile, phase two once, a person's
hand on a job. Marked `e2e`; webserver and daemon are real, the provider is the stateful fake on a socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_assets.registry import Job, Ledger
from finetune_assets_tests.e2e.running_ui import Ui, chromium_page, picture, running
from finetune_assets_tests.training import fake_provider
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.fake_provider.process import KEY
from finetune_assets_tests.training.remote_request import own_days

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SETTINGS = """
select: {{tenant: {tenant}}}
language: es
trainer: openai
min_examples: 30
hyperparameters: {{epochs: 1}}
benchmark: {{max_rows: 12}}
budget: {{training_usd: 5, monthly_usd: 20}}
remote: {{min_model_life_days: 0}}
"""
RUNS = """
query ($job: String!) { runsOrError(filter: {pipelineName: $job}) { ... on Runs {
  results { runId status startTime endTime tags { key value } }
} } }"""


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeProvider]:
    with fake_provider.start() as found:
        found.set(progress=["running", "succeeded"])
        yield found
        assert found.state()["violations"] == []


@pytest.fixture(scope="module")
def ui(fake: FakeProvider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    home, settings = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("assistants")
    for name, tenant in (("aurora", "clinica_aurora"), ("sonrisas", "clinica_sonrisas")):
        (settings / f"{name}.yaml").write_text(SETTINGS.format(tenant=tenant))
    environment = {
        "FINETUNE_HOME": str(home),
        "FINETUNE_SOURCE": "data/sample",
        "FINETUNE_ASSISTANTS": str(settings),
        "FINETUNE_FIRST_WEEK": "2026-09-14",
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": fake.url,
        "FINETUNE_TABLES": str(own_days(home / "tables")),
        "HF_HUB_OFFLINE": "1",
    }
    with running(home, environment) as found:
        yield found


def runs(ui: Ui, job: str) -> list[dict[str, Any]]:
    return ui.ask(RUNS, {"job": job})["runsOrError"]["results"]


def until(ui: Ui, found: Callable[[Ledger], Any], seconds: float = 120) -> Any:
    """What a question to the ledger gives once it gives something."""
    ledger, end = Ledger(f"sqlite:///{ui.home / 'ledger.db'}"), time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if answer := found(ledger):
                return answer
            time.sleep(1)
    finally:
        ledger.close()
    raise AssertionError("not within its time")


def begun(ui: Ui, do: str, job: str) -> str:
    """A person's launch of `control_jobs`; the run."""
    return ui.launch("control_jobs", {}, {"ops": {"control": {"config": {"do": do, "job": job}}}})


def test_the_worker_is_free_while_rented_jobs_run(ui: Ui, fake: FakeProvider) -> None:
    weeks = {"dagster/asset_partition_range_start": "2026-09-14", "dagster/asset_partition_range_end": "2026-11-16"}
    assert ui.wait(ui.launch("prepare_corpus", weeks)) == "SUCCESS"
    fake.set(progress=["running"])  # until we say so, the jobs go on
    both = {name: ui.launch("train", {"dagster/partition": name}) for name in ("aurora", "sonrisas")}
    assert [ui.wait(run) for run in both.values()] == ["SUCCESS", "SUCCESS"]
    # training_job holds the pool of one slot: both runs have had it, and ended, while both jobs are still at work
    assert [job["status"] for job in fake.jobs] == ["running", "running"]
    jobs: dict[str, Job] = until(ui, lambda ledger: {job.assistant: job for job in ledger.jobs()})
    assert {job.status for job in jobs.values()} <= {"pending", "running"}
    until(ui, lambda ledger: all(job.status == "running" for job in ledger.jobs()))  # the sensor has asked
    assert runs(ui, "release") == []

    assert ui.wait(begun(ui, "pause", jobs["aurora"].id)) == "SUCCESS"
    assert sorted(job["status"] for job in fake.jobs) == ["paused", "running"]
    both_hands = [begun(ui, "resume", jobs["aurora"].id), begun(ui, "cancel", jobs["sonrisas"].id)]
    assert [ui.wait(run) for run in both_hands] == ["SUCCESS", "SUCCESS"]
    assert sorted(job["status"] for job in fake.jobs) == ["cancelled", "running"]

    fake.set(progress=["running", "succeeded"])
    ended: Job = until(ui, lambda ledger: next((job for job in ledger.jobs("aurora") if job.released_at), None), 240)
    [phase_two] = runs(ui, "release")
    ui.wait(phase_two["runId"])  # it fails where a gate says no: a verdict
    assert {"key": "dagster/run_key", "value": f"release:{ended.id}:0"} in phase_two["tags"]
    assert [run["runId"] for run in runs(ui, "release")] == [phase_two["runId"]]
    submitted = {run["runId"]: run for run in runs(ui, "train")}
    assert len(submitted) == 2
    finished = next(job["finished_at"] for job in fake.jobs if job["status"] == "succeeded")
    assert all(run["endTime"] < finished for run in submitted.values())
    assert len(fake.jobs) == 2
    assert until(ui, lambda ledger: ledger.versions("aurora"))[0].verdict is not None


def test_what_the_pages_show(ui: Ui) -> None:
    with chromium_page() as page:
        page.goto(f"{ui.url}/assets/training_job?view=events&partition=aurora", wait_until="domcontentloaded")
        page.get_by_text("provider_job", exact=True).first.wait_for(timeout=60_000)
        page.wait_for_timeout(1500)
        for text in ("actual_usd", "difference_usd", "spent_this_month_usd"):
            assert page.get_by_text(text, exact=True).count(), text
        picture(page, "remote_training_job")
        for path, text, name in (
            ("runs", "release", "remote_runs"),
            ("assets/training_job?view=overview", "spent_this_month_usd", "remote_overview"),
            ("assets/benchmark_report?view=partitions&partition=aurora", "usd", "remote_report"),
            ("assets/trained_model?view=checks", "model_lives", "remote_model_lives"),
            ("locations/finetune_assets/jobs/control_jobs/playground", "control_jobs", "remote_control"),
        ):
            page.goto(f"{ui.url}/{path}", wait_until="domcontentloaded")
            page.get_by_text(text).first.wait_for(timeout=60_000)
            page.wait_for_timeout(2500)
            picture(page, name)
