"""The `rollout` asset, its sensor, health and digest on a real instance and ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context

from finetune_assets.assets import deployment
from finetune_assets.automation import rollouts
from finetune_assets.resources import AssistantsResource, LedgerResource, StoreResource
from finetune_assets.resources.tags import JOB
from finetune_assets_tests.code_location import DEFINITIONS
from finetune_assets_tests.serving.shop import Shop
from finetune_assets_tests.serving.test_control import traffic


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides={"telemetry": {"enabled": False}}) as made:
        made.add_dynamic_partitions("assistant", ["aurora"])
        yield made


def test_from_the_asset_into_shadow_and_back_by_the_sensor(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    shop = Shop(tmp_path)
    version = shop.version("a")
    refused = shop.version("b", verdict="cannot_tell")
    with shop.ledger() as book:
        jobs = {made.version: made.job_id for made in book.versions("aurora")}
    resources: dict[str, Any] = {
        "store": StoreResource(home=str(shop.home)),
        "assistants": AssistantsResource(folder=str(shop.assistants)),
        "ledger": LedgerResource(url=shop.url),
    }

    def run(asset: dg.AssetsDefinition, name: str | None, fine: bool = True) -> dict[str, Any]:
        tags = {JOB: jobs[name]} if name else {}
        made = dg.materialize(
            [asset],
            instance=instance,
            resources=resources,
            partition_key="aurora" if asset.partitions_def else None,
            tags=tags,
            raise_on_error=fine,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        assert made.success == fine
        events = made.get_asset_materialization_events()
        return dict(events[0].materialization.metadata) if events else {}

    run(deployment.rollout, refused, fine=False)
    first = run(deployment.rollout, version)
    assert (first["done"].value, first["step"].value, first["champion"].value) == ("in shadow", "shadow", "base model")
    with shop.ledger() as book:
        assert [job.id for job in book.unreleased()] == [jobs[refused]]  # the refused run is not done: a person decides
    assert run(deployment.rollout, version)["done"].value == "unchanged"

    def tick() -> dg.SensorResult | dg.SkipReason:
        context = dg.build_sensor_context(instance=instance, resources=resources, definitions=DEFINITIONS)
        with partition_loading_context(dynamic_partitions_store=instance):
            return rollouts.rollout_steps(context)

    assert isinstance(tick(), dg.SkipReason)
    traffic(shop, "champion", 100)
    traffic(shop, "candidate", 100, bad=0.3)
    seen = tick()
    assert isinstance(seen, dg.SensorResult)
    assert [event.metadata["event"].value for event in seen.asset_events] == ["rolled_back"]
    assert isinstance(tick(), dg.SkipReason)
    assert "rolled back before" in run(deployment.rollout, version)["done"].value

    health = run(deployment.serving_health, None)
    assert health["champion"].value == "base model"
    digest = run(deployment.weekly_digest, None)["digest"].value
    assert f"rolled back: {version}" in digest
