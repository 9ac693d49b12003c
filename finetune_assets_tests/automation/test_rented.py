"""The sensors of rented trainers: a remote job from submission to phase two, and a model whose end comes near."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from dagster._core.definitions.partitions.context import partition_loading_context

from finetune_assets.assets.training import model_lives
from finetune_assets.automation import sensors
from finetune_assets.cli import main
from finetune_assets.environment import ROOT
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import open_journal
from finetune_assets.registry.tables import now, remote_jobs
from finetune_assets.resources import AssistantsResource, LedgerResource, StoreResource, TrainerResource
from finetune_assets.resources.tags import DATASET, JOB, MIGRATE_TO
from finetune_assets.storage import Store, point, write_json
from finetune_assets.training import lifecycle
from finetune_assets.training.openai_wire import OpenAIWire
from finetune_assets.training.remote import Connection, RemoteModel
from finetune_assets.training.submission import bill, submit
from finetune_assets.training.trainer import Estimate
from finetune_assets_tests.code_location import DEFINITIONS
from finetune_assets_tests.training import fake_provider, many_jobs
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.fake_provider.process import KEY
from finetune_assets_tests.training.remote_request import assistant, dataset, request

SETTINGS = "select: {vertical: dental}\ntrainer: openai\nremote: {min_model_life_days: 0, successor: local/data/base_model}\n"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeProvider]:
    with fake_provider.start() as running:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        yield running


class World:
    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.instance, self.folder = instance, folder
        self.store, self.url = Store(folder / "home"), f"sqlite:///{folder / 'ledger.db'}"
        (folder / "assistants").mkdir()
        (folder / "assistants" / "dental.yaml").write_text(SETTINGS)
        self.resources: dict[str, Any] = {
            "store": StoreResource(home=str(folder / "home")),
            "assistants": AssistantsResource(folder=str(folder / "assistants")),
            "ledger": LedgerResource(url=self.url),
            "trainer": TrainerResource(),
        }
        instance.add_dynamic_partitions("assistant", ["dental"])

    def tick(self, sensor: dg.SensorDefinition, *names: str, cursor: str | None = None) -> Any:
        chosen = {name: self.resources[name] for name in names}
        context = dg.build_sensor_context(instance=self.instance, resources=chosen, definitions=DEFINITIONS, cursor=cursor)
        with partition_loading_context(dynamic_partitions_store=self.instance):
            return sensor.evaluate_tick(context)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides={"telemetry": {"enabled": False}}) as instance:
        yield World(tmp_path, instance)


def numbers(event: Any) -> dict[str, Any]:
    return {key: getattr(value, "value", value) for key, value in event.metadata.items()}


def test_a_remote_job_is_observed_then_released_once(fake: FakeProvider, world: World) -> None:
    settings, book = assistant(), Ledger(world.url)
    columns: dict[str, Any] = {"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": "f1"}
    columns |= {
        "provider": "openai",
        "base_model": settings.base_model,
        "hyperparameters": {},
        "plan": {"usd": 0.02},
        "spec_hash": "s",
    }
    job = book.open_job(columns)
    journal = open_journal(book, job.id, Connection.of(settings).to_dict(), 72)
    asked = request(dataset(world.folder / "frozen"), settings)
    estimate = Estimate(1000, False, None, 0.02, None)
    submit(
        book, job, OpenAIWire(Connection.of(settings), world.store, journal), asked, bill(settings, asked, estimate, None, job.id)
    )

    seen: list[dict[str, Any]] = []
    for _ in range(4):
        with book.engine.begin() as connection:
            connection.execute(sa.update(remote_jobs).values(next_poll_at=now()))
        data = world.tick(sensors.finished_jobs, "store", "ledger", "trainer")
        seen += [numbers(event) for event in data.asset_events]
    assert [one["provider_status"] for one in seen] == ["validating_files", "queued", "running", "succeeded"]
    assert (seen[2]["progress/train_loss"], seen[2]["progress/message"]) == (0.4286, "The job has successfully completed")
    assert seen[3]["actual_usd"] == round(fake.jobs[0]["trained_tokens"] * 3 / 1e6, 4)
    assert seen[3]["difference_usd"] == pytest.approx(seen[3]["actual_usd"] - 0.02, abs=1e-4)
    [release] = data.run_requests or []
    assert (release.partition_key, release.tags[JOB]) == ("dental", job.id)
    again = world.tick(sensors.finished_jobs, "store", "ledger", "trainer")
    assert [one.run_key for one in again.run_requests] == [release.run_key]  # deduplicated by Dagster
    assert not again.asset_events
    book.close()


def test_two_hundred_open_jobs_in_one_tick_of_the_sensor(fake: FakeProvider, world: World) -> None:
    names = tuple(f"assistant_{number}" for number in range(20))
    world.instance.add_dynamic_partitions("assistant", list(names))
    book = Ledger(world.url)
    many_jobs.open_jobs(fake, book, world.folder, 200, names)
    book.close()
    cpu, wall = time.process_time(), time.monotonic()
    data = many_jobs.tick(world.instance, world.folder / "home", world.url)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    assert len(data.asset_events) == 200
    assert numbers(data.asset_events[0])["progress/train_loss"] == 0.4286
    assert cpu <= 5, f"{cpu:.1f} s of CPU"
    assert wall < 60


def test_a_model_that_ends_is_told_once_a_threshold_and_migrated(
    fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("store", "assistants", "ledger", "trainer")
    write_json(world.store.dataset("dental", "f1") / "manifest.json", {"fingerprint": "f1"})
    point(world.store.datasets("dental") / "latest", "f1")

    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 9, 1))
    quiet = world.tick(sensors.model_lifecycle, *names)
    assert not quiet.asset_events
    assert not quiet.run_requests

    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 12, 20))
    data = world.tick(sensors.model_lifecycle, *names)
    [event] = data.asset_events
    told = numbers(event)
    assert told["days_left"] == 25
    assert "stops answering on 2027-01-14 (in 25 days)" in told["message"]
    assert "finetune migrate dental --to local/data/base_model" in told["message"]
    [migration] = data.run_requests
    assert (migration.job_name, migration.tags[MIGRATE_TO], migration.tags[DATASET]) == ("migrate", "local/data/base_model", "f1")

    write_json(world.store.dataset("dental", "f2") / "manifest.json", {"fingerprint": "f2"})
    point(world.store.datasets("dental") / "latest", "f2")
    later = world.tick(sensors.model_lifecycle, *names, cursor=data.cursor)
    assert not later.asset_events  # told already
    assert [one.run_key for one in later.run_requests] == [migration.run_key]  # Dagster asks for the same key once
    asked: list[str] = []
    for _ in range(4):  # a run that failed is asked for again, three times in all
        [again] = world.tick(sensors.model_lifecycle, *names, cursor=data.cursor).run_requests
        asked.append(again.run_key)
        tags = {**again.tags, "dagster/partition": "dental"}
        world.instance.add_run(dg.DagsterRun(job_name="migrate", status=dg.DagsterRunStatus.FAILURE, tags=tags))
    assert (asked[0], len(set(asked)), asked[2]) == (migration.run_key, 3, asked[3])
    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2027, 1, 10))
    assert len(world.tick(sensors.model_lifecycle, *names, cursor=data.cursor).asset_events) == 1  # the next threshold

    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 9, 1))
    fake.set(shutdown={"gpt-4o-mini-2024-07-18": "2026-10-01"})  # the provider's own word goes before the table
    [event] = world.tick(sensors.model_lifecycle, *names).asset_events
    assert "2026-10-01" in numbers(event)["message"]


def test_the_doctor_and_the_sensor_say_what_dies_by_the_shipped_table(
    fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample's assistant, whose model is a tuned gpt-4o-mini, seen on 2026-12-20."""
    yaml = (ROOT / "finetune_assets" / "assistants" / "dental.yaml").read_text() + "trainer: openai\n"
    (world.folder / "assistants" / "dental.yaml").write_text(yaml)
    book, settings = Ledger(world.url), assistant()
    columns: dict[str, Any] = {"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": "f1"}
    columns |= {"provider": "openai", "base_model": settings.base_model, "hyperparameters": {}, "plan": {}, "spec_hash": "s"}
    job = book.set_job(book.open_job(columns).id, "succeeded")
    version = book.mint_version(job, "c" * 64, world.store.model("dental", "x").parent).version
    book.close()
    RemoteModel("openai", "ft:gpt-4o-mini-2024-07-18:clinic::Ab1", fake.url).write(world.store.model("dental", version))
    folders = {"HOME": world.store.home, "ASSISTANTS": world.folder / "assistants", "SOURCE": ROOT / "data" / "sample"}
    for name, value in {**folders, "DATABASE_URL": world.url}.items():
        monkeypatch.setenv(f"FINETUNE_{name}", str(value))
    monkeypatch.delenv("FINETUNE_TABLES", raising=False)

    done = CliRunner().invoke(main, ["doctor", "--as-of", "2026-12-20"])
    assert done.exit_code == 1
    told = [line for line in done.output.splitlines() if "2027-01-14 (in 25 days)" in line]
    for what in (f"version {version} of dental (openai ft:gpt-4o-mini-2024-07-18:clinic::Ab1)", "base model in the settings of"):
        [line] = [line for line in told if what in line]
        assert line.startswith("problem")
        assert "finetune migrate dental --to local/data/base_model" in line

    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 12, 20))
    events = world.tick(sensors.model_lifecycle, "store", "assistants", "ledger", "trainer").asset_events
    said = [numbers(event)["message"] for event in events]
    assert sorted(said) == sorted(line.partition("2026-12-20: ")[2] for line in told)


def test_the_check_counts_every_model_and_the_providers_own_days(
    fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose training ends first, which is a warning, and a version that stops, which is an error."""
    names = ("store", "assistants", "ledger", "trainer")
    columns: dict[str, Any] = {"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": "f1"}
    columns |= {"provider": "openai", "base_model": "b", "hyperparameters": {}, "plan": {}, "spec_hash": "s"}
    book = Ledger(world.url)
    version = book.mint_version(book.open_job(columns), "c" * 64, world.store.model("dental", "x").parent)
    book.close()
    RemoteModel("openai", "ft:gpt-4o-mini-2024-07-18:org::x", fake.url).write(Path(version.path))
    (world.folder / "assistants" / "dental.yaml").write_text(SETTINGS + "base_model: gpt-5-small\n")

    def checked(day: datetime.date) -> dg.AssetCheckResult:
        monkeypatch.setattr(lifecycle, "today", lambda: day)
        context: Any = SimpleNamespace(partition_key="dental", log=logging.getLogger())
        check: Any = model_lives.op.compute_fn
        return check.decorated_fn(context, **{name: world.resources[name] for name in names})

    found = checked(datetime.date(2026, 12, 20))
    assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert "base model in the settings of dental" in (found.description or "")
    assert f"version {version.version} of dental" in (found.description or "")
    assert checked(datetime.date(2026, 9, 1)).passed
    (world.folder / "assistants" / "dental.yaml").write_text(SETTINGS)
    fake.set(shutdown={"gpt-4o-mini-2024-07-18": "2026-09-20"})  # goes before the table
    found = checked(datetime.date(2026, 9, 1))
    assert (found.severity, "2026-09-20 (in 19 days)" in (found.description or "")) == (dg.AssetCheckSeverity.ERROR, True)
