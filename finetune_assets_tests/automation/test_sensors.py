"""Schedule and sensors on a real instance: each training is asked for once, and never twice for the same reason."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context

from finetune_assets.automation import rollouts, schedules, sensors
from finetune_assets.automation.failures import explain_failure
from finetune_assets.environment import ROOT
from finetune_assets.registry import Ledger, erasures
from finetune_assets.resources import AssistantsResource, LedgerResource, SourceResource, StoreResource, TrainerResource
from finetune_assets.resources.tags import JOB, RANGE_END, RANGE_START, REASON, TRAIN_AFTERWARDS
from finetune_assets.serving.health import health_file
from finetune_assets_tests.code_location import DEFINITIONS

SAMPLE = ROOT / "data" / "sample"
SETTINGS = "select: {vertical: dental}\nretrain: {feedback_threshold: 200}\n"


class World:
    """A small store with its source, settings, ledger and instance."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.source_folder, assistants = folder / "source", folder / "assistants"
        self.source_folder.mkdir()
        assistants.mkdir()
        (assistants / "dental.yaml").write_text(SETTINGS)
        (assistants / "resting.yaml").write_text(
            "select: {vertical: restaurant}\nretrain: {weekly: false, feedback_threshold: 9999}\n"
        )
        for table in ("conversations", "messages", "feedback"):
            pl.read_parquet(SAMPLE / f"{table}.parquet").write_parquet(self.source_folder / f"{table}.parquet")
        self.url = f"sqlite:///{folder / 'ledger.db'}"
        self.resources: dict[str, Any] = {
            "source": SourceResource(urls=[str(self.source_folder)]),
            "store": StoreResource(home=str(folder / "home")),
            "assistants": AssistantsResource(folder=str(assistants)),
            "ledger": LedgerResource(url=self.url),
            "trainer": TrainerResource(),
        }
        instance.add_dynamic_partitions("assistant", ["dental", "resting"])

    def tick(self, sensor: dg.SensorDefinition, *names: str) -> list[dg.RunRequest]:
        chosen = {name: self.resources[name] for name in names}
        context = dg.build_sensor_context(instance=self.instance, resources=chosen, definitions=DEFINITIONS)
        with partition_loading_context(dynamic_partitions_store=self.instance):  # as the code server does
            data = sensor.evaluate_tick(context)
        return list(data.run_requests or [])

    def prepare(self, request: dg.RunRequest) -> None:
        job = DEFINITIONS.resolve_job_def("prepare_corpus")
        result = job.execute_in_process(
            instance=self.instance,
            tags=dict(request.tags),
            resources=self.resources,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        assert result.success


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides={"telemetry": {"enabled": False}}) as instance:
        yield World(tmp_path, instance)


def test_feedback_starts_one_training(world: World) -> None:
    names = ("source", "store", "assistants", "ledger")
    first = world.tick(sensors.feedback_volume, *names)
    assert [request.job_name for request in first] == ["prepare_corpus"]  # the corpus comes first
    assert {RANGE_START, RANGE_END} <= set(first[0].tags)
    assert [one.run_key for one in world.tick(sensors.feedback_volume, *names)] == [first[0].run_key]  # deduplicated by Dagster
    world.prepare(first[0])

    due = world.tick(sensors.feedback_volume, *names)
    assert [(request.job_name, request.partition_key) for request in due] == [("train", "dental")]
    assert world.tick(sensors.feedback_volume, *names)[0].run_key == due[0].run_key  # same feedback, same key

    run = dg.DagsterRun(job_name="train", status=dg.DagsterRunStatus.STARTED, tags={"dagster/partition": "dental"})
    world.instance.add_run(run)
    assert world.tick(sensors.feedback_volume, *names) == []  # one is under way


def test_a_source_that_never_rests_starts_trainings_too(world: World) -> None:
    """The router writes all the time, so a week is always behind; what has been read is enough to begin."""
    names = ("source", "store", "assistants", "ledger")

    def write(text: str) -> None:
        file = world.source_folder / "messages.parquet"
        newest = pl.col("created_at") == pl.col("created_at").max()
        frame = pl.read_parquet(file)
        frame.with_columns(content=pl.when(newest).then(pl.lit(text)).otherwise("content")).write_parquet(file)

    [first] = world.tick(sensors.feedback_volume, *names)
    world.prepare(first)
    write("¿Tienen hora mañana a primera hora?")
    [due] = world.tick(sensors.feedback_volume, *names)
    assert (due.job_name, due.partition_key) == ("train", "dental")
    tags = {"dagster/run_key": due.run_key or "", "dagster/partition": "dental"}
    world.instance.add_run(dg.DagsterRun(job_name="train", status=dg.DagsterRunStatus.FAILURE, tags=tags))
    write("¿Y el jueves?")
    assert "prepare_corpus" in [
        one.job_name for one in world.tick(sensors.feedback_volume, *names)
    ]  # it failed: on to new feedback


def test_drift_is_trained_on_what_the_users_said(world: World) -> None:
    """The corpus is read before, once a week; then each assistant that drifted is trained, once, with its own reason."""
    names = ("source", "store", "ledger")
    assert world.tick(rollouts.drifted, *names) == []
    for assistant, measures in (("dental", ["intents"]), ("resting", ["lengths", "unknown_words"])):
        file = health_file(world.resources["store"].store, assistant)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"drifted": measures}))
    [reading] = world.tick(rollouts.drifted, *names)
    assert reading.job_name == "prepare_corpus"
    assert reading.tags[RANGE_START] <= reading.tags[RANGE_END]
    run = dg.DagsterRun(job_name="prepare_corpus", status=dg.DagsterRunStatus.STARTED, tags=dict(reading.tags))
    world.instance.add_run(run)
    assert world.tick(rollouts.drifted, *names) == []  # it waits
    world.instance.report_run_failed(run)
    [again] = world.tick(rollouts.drifted, *names)
    assert (again.job_name, again.run_key == reading.run_key) == ("prepare_corpus", False)
    run = dg.DagsterRun(job_name="prepare_corpus", status=dg.DagsterRunStatus.SUCCESS, tags=dict(again.tags))
    world.instance.add_run(run)  # rows that have come since are no reason to wait again
    asked = world.tick(rollouts.drifted, *names)
    told = [(one.job_name, one.partition_key, one.tags[REASON]) for one in asked]
    assert told == [("train", "dental", "drift:intents"), ("train", "resting", "drift:lengths+unknown_words")]
    tags = {"dagster/run_key": asked[0].run_key or "", "dagster/partition": "dental"}
    world.instance.add_run(dg.DagsterRun(job_name="train", status=dg.DagsterRunStatus.SUCCESS, tags=tags))
    assert [one.partition_key for one in world.tick(rollouts.drifted, *names)] == ["resting"]


def test_feedback_is_counted_since_the_last_training(world: World) -> None:
    from finetune_assets.assistants import load_assistant
    from finetune_assets.dataset import choose, freeze

    names = ("source", "store", "assistants", "ledger")
    world.prepare(world.tick(sensors.feedback_volume, *names)[0])
    store = world.resources["store"].store
    dental = load_assistant(world.resources["assistants"].path, "dental")
    fingerprint = freeze(store, dental, choose(store, dental))["fingerprint"]
    assert world.tick(sensors.feedback_volume, *names)  # frozen, but nothing was trained on it
    book = Ledger(world.url)
    columns: dict[str, Any] = {
        "assistant": "dental",
        "tenant_id": None,
        "dataset_id": "ds",
        "dataset_fingerprint": fingerprint,
        "provider": "local",
        "base_model": "b",
        "hyperparameters": {},
        "plan": {},
        "spec_hash": "s",
    }
    book.set_job(book.open_job(columns).id, "succeeded")
    assert world.tick(sensors.feedback_volume, *names) == []
    erasures.mark_dataset(book, "dental", fingerprint, "fedcba9876543210fedc", 3)
    [request] = world.tick(sensors.feedback_volume, *names)
    assert request.tags[REASON] == f"erasure:{fingerprint}"
    book.set_job(book.open_job({**columns, "dataset_fingerprint": "fedcba9876543210fedc", "spec_hash": "t"}).id, "running")
    assert [one.tags[REASON] for one in world.tick(sensors.feedback_volume, *names) if "erasure" in one.tags[REASON]] == []
    book.close()


def test_the_schedule_and_corpus_ready_ask_for_one_training_an_assistant(world: World) -> None:
    context = dg.build_schedule_context(
        instance=world.instance,
        scheduled_execution_time=datetime.datetime(2026, 11, 2, 3, tzinfo=datetime.UTC),
        resources={name: world.resources[name] for name in ("source", "store", "assistants", "ledger")},
        repository_def=DEFINITIONS.get_repository_def(),
    )
    with partition_loading_context(dynamic_partitions_store=world.instance):
        [request] = schedules.weekly_retrain.evaluate_tick(context).run_requests or []
    assert request.tags[TRAIN_AFTERWARDS] == "dental"  # `resting` does not take part
    assert request.tags[REASON] == "weekly:2026-W45"
    assert request.tags[RANGE_START] <= "2026-08-03"
    assert request.tags[RANGE_END] == "2026-11-02"  # the current week, not those after it

    job = DEFINITIONS.resolve_job_def("prepare_corpus")
    result = job.execute_in_process(
        instance=world.instance,
        tags={**request.tags, RANGE_START: "2026-08-03", RANGE_END: "2026-08-03"},
        resources=world.resources,
    )
    status = dg.build_run_status_sensor_context(
        sensor_name="corpus_ready",
        dagster_event=result.get_run_success_event() if hasattr(result, "get_run_success_event") else result.all_events[-1],
        dagster_instance=world.instance,
        dagster_run=result.dagster_run,
    )
    requests = list(sensors.corpus_ready(status))
    assert [(one.run_key, one.partition_key) for one in requests] == [("2026-W45:dental:1", "dental")]


def test_finished_jobs_go_on_once(world: World) -> None:
    book = Ledger(world.url)
    columns: dict[str, Any] = {
        "assistant": "dental",
        "tenant_id": None,
        "dataset_id": "ds",
        "dataset_fingerprint": "f",
        "provider": "local",
        "base_model": "b",
        "hyperparameters": {},
        "plan": {},
        "spec_hash": "s",
    }
    job = book.set_job(book.open_job(columns).id, "succeeded")
    gone = book.set_job(book.open_job({**columns, "assistant": "deleted", "spec_hash": "t"}).id, "succeeded")
    [request] = world.tick(sensors.finished_jobs, "store", "ledger", "trainer")
    assert (request.partition_key, request.tags[JOB]) == ("dental", job.id)
    assert world.tick(sensors.finished_jobs, "store", "ledger", "trainer")[0].run_key == request.run_key
    run = dg.DagsterRun(job_name="release", status=dg.DagsterRunStatus.STARTED, tags={})
    world.instance.add_run(run)
    assert book.claim_release(job.id, f"run:{run.run_id}")
    assert world.tick(sensors.finished_jobs, "store", "ledger", "trainer") == []
    world.instance.report_run_failed(run)
    [again] = world.tick(sensors.finished_jobs, "store", "ledger", "trainer")
    assert again.run_key != request.run_key  # a run that died is replaced
    book.release_done(job.id)
    assert world.tick(sensors.finished_jobs, "store", "ledger", "trainer") == []
    assert book.job(gone.id).released_at is None
    book.close()


def test_tenants_with_enough_examples_are_enrolled(world: World) -> None:
    names = ("source", "store", "assistants", "ledger")
    world.prepare(world.tick(sensors.feedback_volume, *names)[0])
    context = dg.build_sensor_context(
        instance=world.instance,
        resources={name: world.resources[name] for name in ("store", "assistants")},
        definitions=DEFINITIONS,
    )
    data = sensors.enrol_tenants.evaluate_tick(context)
    [added] = data.dynamic_partitions_requests or []
    tenants = set(world.resources["store"].tenants())
    assert set(added.partition_keys) == tenants
    world.instance.add_dynamic_partitions("assistant", added.partition_keys)
    assert not sensors.enrol_tenants.evaluate_tick(context).dynamic_partitions_requests


def test_a_failure_is_explained(world: World) -> None:
    (world.source_folder / "messages.parquet").unlink()
    result = DEFINITIONS.resolve_job_def("prepare_corpus").execute_in_process(
        instance=world.instance,
        tags={RANGE_START: "2026-08-03", RANGE_END: "2026-08-10"},
        resources=world.resources,
        raise_on_error=False,
    )
    assert not result.success
    notice = explain_failure(world.instance, result.dagster_run, "")
    assert notice is not None
    assert "messages" in notice["message"]
    assert "2026-08-03 to 2026-08-10" in notice["message"]
