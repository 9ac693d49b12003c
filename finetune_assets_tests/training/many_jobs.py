"""Many open jobs at the fake, and a tick of the sensor over them as the daemon runs it; for a test and for the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.partitions.context import partition_loading_context

from finetune_assets.automation import sensors
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import LedgerJournal, open_journal
from finetune_assets.resources import LedgerResource, StoreResource, TrainerResource
from finetune_assets.training.remote import Connection
from finetune_assets_tests.code_location import DEFINITIONS
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.remote_request import assistant, dataset, request, wire


def open_jobs(fake: FakeProvider, ledger: Ledger, folder: Path, count: int, names: tuple[str, ...] = ("dental",)) -> None:
    """`count` running jobs at the fake, each with a journal in the ledger, of these assistants in turns."""
    settings = assistant()
    asked = request(dataset(folder / "frozen"), settings)
    fake.set(progress=["queued", "running"])
    trainer = wire(settings, folder / "home")
    trainer.poll(trainer.submit(asked))  # from here on it runs, with 120 events
    fake.clone(count - 1)
    connection = Connection.of(settings).to_dict()
    same: dict[str, Any] = {"tenant_id": None, "dataset_id": "ds", "dataset_fingerprint": "f1", "provider": "openai"}
    same |= {"base_model": asked.base_model, "hyperparameters": {}, "plan": {"usd": 0.02}}
    for number, job_id in enumerate([job["id"] for job in fake.jobs]):
        job = ledger.open_job({**same, "assistant": names[number % len(names)], "spec_hash": f"s{number}"})
        open_journal(ledger, job.id, connection, 72)
        LedgerJournal(ledger, job.id).save(run_key=job.id, create_started="2026-11-21T00:00:00+00:00", provider_job_id=job_id)


def tick(instance: dg.DagsterInstance, home: Path, url: str) -> Any:
    """What one evaluation of `finished_jobs` asks Dagster for."""
    chosen = {"store": StoreResource(home=str(home)), "ledger": LedgerResource(url=url), "trainer": TrainerResource()}
    context = dg.build_sensor_context(instance=instance, resources=chosen, definitions=DEFINITIONS)
    with partition_loading_context(dynamic_partitions_store=instance):
        return sensors.finished_jobs.evaluate_tick(context)
