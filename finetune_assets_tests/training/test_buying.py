"""Between the plan and the purchase: the assets themselves, against the stand-in."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune_assets.assets.training import training_job, training_plan
from finetune_assets.errors import BudgetExceeded, DataError, ModelUnavailable, SettingsError
from finetune_assets.registry import Ledger
from finetune_assets.resources import AssistantsResource, LauncherResource, LedgerResource, StoreResource, TrainerResource
from finetune_assets.storage import Store, point, write_json
from finetune_assets.training import lifecycle
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.remote_request import dataset

pytestmark = pytest.mark.filterwarnings("ignore:AssetExecutionContext.run_tags")

SETTINGS = "select: {vertical: dental}\ntrainer: openai\nremote: {min_model_life_days: 0}\n"


class World:
    """An assistant with a frozen data set."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.instance, self.url = instance, f"sqlite:///{folder / 'ledger.db'}"
        self.yaml, store = folder / "assistants" / "dental.yaml", Store(folder / "home")
        self.yaml.parent.mkdir()
        self.yaml.write_text(SETTINGS)
        frozen = dataset(store.dataset("dental", "f1f1f1"))
        write_json(frozen / "manifest.json", {"fingerprint": "f1f1f1", "counts": {"tenant": {"norte": 30}}})
        point(store.datasets("dental") / "latest", "f1f1f1")
        self.resources: dict[str, Any] = {
            "store": StoreResource(home=str(folder / "home")),
            "assistants": AssistantsResource(folder=str(self.yaml.parent)),
            "ledger": LedgerResource(url=self.url),
            "trainer": TrainerResource(),
            "launcher": LauncherResource(),
        }
        instance.add_dynamic_partitions("assistant", ["dental"])

    def make(self, asset: dg.AssetsDefinition) -> None:
        dg.materialize(
            [training_plan, training_job],
            selection=[asset],
            partition_key="dental",
            resources=self.resources,
            instance=self.instance,
        )

    def statuses(self) -> list[str]:
        book = Ledger(self.url)
        found = [job.status for job in book.jobs()]
        book.close()
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides={"telemetry": {"enabled": False}}) as instance:
        yield World(tmp_path, instance)


def test_what_was_planned_with_other_settings_is_not_bought(fake: FakeProvider, world: World) -> None:
    world.make(training_plan)
    for change in ("hyperparameters: {epochs: 7}\n", "base_model: gpt-4.1-mini-2025-04-14\n"):
        world.yaml.write_text(SETTINGS + change)
        with pytest.raises(
            DataError, match=r"The training plan of dental is of openai/gpt-4o-mini.*Materialise training_plan again"
        ):
            world.make(training_job)
    assert (fake.jobs, world.statuses()) == ([], [])
    world.yaml.write_text(SETTINGS)
    world.make(training_job)
    assert (len(fake.jobs), world.statuses()) == (1, ["pending"])


def test_what_is_bought_is_taken_although_its_model_ends_soon_by_now(
    fake: FakeProvider, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.yaml.write_text(SETTINGS.replace("days: 0", "days: 90"))
    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 10, 1))
    for asset in (training_plan, training_job):
        world.make(asset)
    monkeypatch.setattr(lifecycle, "today", lambda: datetime.date(2026, 11, 22))
    for asset in (training_plan, training_job):
        world.make(asset)
    assert (len(fake.jobs), world.statuses()) == (1, ["pending"])
    world.yaml.write_text(world.yaml.read_text() + "hyperparameters: {seed: 7}\n")
    with pytest.raises(ModelUnavailable, match="in 53 days"):
        world.make(training_plan)


def test_a_refusal_after_the_plan_leaves_no_open_job(fake: FakeProvider, world: World) -> None:
    world.make(training_plan)
    for change, error in (
        ("budget: {training_usd: 0.00001}\n", BudgetExceeded),
        ("budget: {monthly_usd: 0.00001}\n", BudgetExceeded),
    ):
        world.yaml.write_text(SETTINGS + change)
        with pytest.raises(error):
            world.make(training_job)
    world.yaml.write_text(SETTINGS.replace("remote: {", "remote: {allowed: false, "))
    with pytest.raises(SettingsError, match="nothing of it leaves"):
        world.make(training_job)
    assert (fake.jobs, world.statuses()) == ([], [])
