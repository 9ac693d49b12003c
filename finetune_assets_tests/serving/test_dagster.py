"""The `rollout` asset, its sensor, health and digest on a real instance and ledger."""

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

from finetune_assets.assets import deployment
from finetune_assets.automation import rollouts
from finetune_assets.registry import rollouts as states
from finetune_assets.resources import AssistantsResource, LedgerResource, SourceResource, StoreResource
from finetune_assets.resources.tags import JOB, REASON
from finetune_assets.serving import control
from finetune_assets.serving.writer import store
from finetune_assets_tests.code_location import DEFINITIONS
from finetune_assets_tests.serving.shop import Shop
from finetune_assets_tests.serving.test_control import traffic
from finetune_assets_tests.serving.test_retention import chat, left

NOON = datetime.datetime(2026, 11, 2, 12, tzinfo=datetime.UTC)


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

    seen: list[str | None] = [None]

    def tick() -> list[tuple[str, str]]:
        context = dg.build_sensor_context(instance=instance, cursor=seen[0], resources=resources, definitions=DEFINITIONS)
        with partition_loading_context(dynamic_partitions_store=instance):
            result = rollouts.rollout_steps(context)
        if isinstance(result, dg.SkipReason):
            return []
        assert isinstance(result, dg.SensorResult)
        seen[0] = result.cursor
        return [(str(e.metadata["event"].value), str(e.metadata["actor"].value).split()[0]) for e in result.asset_events]

    assert tick() == [("verdict", "registered_model"), ("verdict", "registered_model"), ("started", "run")]
    assert tick() == []
    with shop.ledger() as book:  # what a person does is shown too
        control.hold(book, "aurora", "wait for the holidays", "ana")
        control.release(book, "aurora", "they are over", "ana")
    traffic(shop, "champion", 100)
    traffic(shop, "candidate", 100, bad=0.3)
    assert tick() == [("held", "ana"), ("released", "ana"), ("rolled_back", "sensor")]
    assert tick() == []
    assert "rolled back or replaced before" in run(deployment.rollout, version)["done"].value

    health = run(deployment.serving_health, None)
    assert health["champion"].value == "base model"
    digest = run(deployment.weekly_digest, None)["digest"].value
    assert f"rolled back {version}: errors" in digest


def test_a_person_decides_in_dagster(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    """The job `move_rollout`: an approval that is waited for, a hold and its end, the way back, and what is refused."""
    shop = Shop(tmp_path)
    version = shop.version("a")
    shop.roll_out(version)
    with shop.ledger() as book:
        before = book.rollout("aurora")
        book.move(before, states.advance(before, "passed", [10, 100], person=False, approval=True), "asked", ("ok", "router"))
    resources: dict[str, Any] = {
        "store": StoreResource(home=str(shop.home)),
        "assistants": AssistantsResource(folder=str(shop.assistants)),
        "ledger": LedgerResource(url=shop.url),
    }

    def decided(action: str, reason: str) -> bool:
        config: dict[str, Any] = {"assistant": "aurora", "action": action, "reason": reason, "who": "ana"}
        config = {"ops": {"decide": {"config": config}}, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        job = rollouts.move_rollout
        return job.execute_in_process(config, instance=instance, resources=resources, raise_on_error=False).success

    for action in ("advance", "hold", "release", "rollback"):
        assert decided(action, f"{action}, since Monday went well")
    assert not decided("advance", "nothing is rolled out")
    assert not decided("rollback", " ")
    assert not decided("promote", "no such action")
    with shop.ledger() as book:
        told = [(event["event"], event["actor"]) for event in book.events("aurora")][3:]
        assert told == [(event, "ana") for event in ("advanced", "held", "released", "rolled_back")]
        assert book.events("aurora")[-1]["reason"] == "rollback, since Monday went well"


def test_rows_go_every_day_where_an_assistant_states_how_long_they_are_kept(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    shop = Shop(tmp_path)
    chat(shop, "old", 40)
    resources: dict[str, Any] = {
        "store": StoreResource(home=str(shop.home)),
        "assistants": AssistantsResource(folder=str(shop.assistants)),
        "ledger": LedgerResource(url=shop.url),
    }

    def due() -> bool:
        context = dg.build_schedule_context(instance=instance, resources=resources, scheduled_execution_time=NOON)
        return isinstance(rollouts.daily_retention(context), dg.RunRequest)

    def run() -> None:
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        assert rollouts.apply_retention.execute_in_process(quiet, instance=instance, resources=resources).success

    assert not due()
    run()
    assert left(shop) == {"old"}
    file = shop.assistants / "aurora.yaml"
    file.write_text(file.read_text().replace("serving: {", "serving: {keep_days: 30, "))
    assert due()
    run()
    assert left(shop) == set()


def test_drift_starts_a_training_with_the_reason_in_its_tags(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    """People begin to ask for what the training set has no words for: `serving_health` measures it, the sensor asks for a run."""
    shop = Shop(tmp_path)
    shop.roll_out(shop.version("a"), "done")
    dataset = shop.home / "datasets" / "aurora" / "latest"
    dataset.mkdir(parents=True)
    says = {"booking": "¿Tienen hora el martes {}?", "prices": "¿Cuánto cuesta la ortodoncia {}?"}
    intents = ["booking", "booking", "booking", "prices"] * 50
    asked = [json.dumps({"messages": [{"role": "user", "content": says[one].format(n)}]}) for n, one in enumerate(intents)]
    lineage = [{"line": line, "intent": intent} for line, intent in enumerate(intents)]
    for split in ("train", "validation"):
        (dataset / f"{split}.jsonl").write_text("\n".join(asked) + "\n")
    frames = [pl.DataFrame(lineage).with_columns(split=pl.lit(split)) for split in ("train", "validation")]
    pl.concat(frames).write_parquet(dataset / "lineage.parquet")
    at = datetime.datetime.now(datetime.UTC).isoformat()
    rows: list[tuple[str, dict[str, Any]]] = []
    for n in range(150):
        talk = {"conversation_id": f"c{n}", "created_at": at}
        request = {"request_id": f"r{n}", "assistant": "aurora", "user": f"u{n}", "kind": "live", "generation": 1, "step": "idle"}
        request |= {"assigned_arm": "champion", "served_arm": "champion", "kept": False, "version": "v", "outcome": "ok"}
        rows.append(("requests", {**talk, **request, "status": 200}))
        said = "Quisiera financiación para ortodoncia invisible con alineadores transparentes, por favor"
        rows.append(("messages", {**talk, "message_id": f"m{n}", "role": "user", "content": said}))
    with shop.ledger() as book:
        store(book.engine, rows)
    resources: dict[str, Any] = {
        "store": StoreResource(home=str(shop.home)),
        "assistants": AssistantsResource(folder=str(shop.assistants)),
        "ledger": LedgerResource(url=shop.url),
    }

    def tick() -> list[dg.RunRequest | dg.SkipReason]:
        chosen = {"source": SourceResource(urls=["data/sample"]), "store": resources["store"], "ledger": resources["ledger"]}
        context = dg.build_sensor_context(instance=instance, resources=chosen, definitions=DEFINITIONS)
        return list(rollouts.drifted(context))  # type: ignore[call-overload]

    assert [type(answer) for answer in tick()] == [dg.SkipReason]  # nothing was measured yet
    made = dg.materialize(
        [deployment.serving_health, deployment.no_drift],
        instance=instance,
        resources=resources,
        partition_key="aurora",
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    [check] = made.get_asset_check_evaluations()
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "prices 25% → 100%" in (check.description or "")
    [reading] = tick()
    assert isinstance(reading, dg.RunRequest)  # what they said comes into the corpus first
    instance.add_run(dg.DagsterRun(job_name="prepare_corpus", status=dg.DagsterRunStatus.SUCCESS, tags=dict(reading.tags)))
    [request] = tick()
    assert isinstance(request, dg.RunRequest)
    assert (request.partition_key, request.tags[REASON]) == ("aurora", "drift:unknown_words+lengths+intents")
    [again] = tick()
    assert isinstance(again, dg.RunRequest)
    assert again.run_key == request.run_key  # once a week: Dagster starts no second run of a key
