"""One tick of the sensor over 200 open jobs at a provider: CPU of asking, reading their metrics and writing all of it down.

    python benchmarks/run.py polling

The provider is the tests' stateful fake, a process of its own on a socket: its CPU is not counted. All jobs run, so each is asked
for its state and for its newest events. Wall time is shown beside the minute that a tick has.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, cpu
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import LedgerJournal, open_journal, open_remote
from finetune_assets.storage import Store
from finetune_assets.training.openai_wire import OpenAIWire
from finetune_assets.training.polling import poll
from finetune_assets.training.remote import Connection, Journal, RemoteTrainer
from finetune_assets_tests.training import fake_provider
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.fake_provider.process import KEY
from finetune_assets_tests.training.remote_request import assistant, dataset, request, wire

JOBS = 200
MOST_SECONDS = 5.0


def open_jobs(fake: FakeProvider, ledger: Ledger, folder: Path, count: int) -> None:
    """`count` running jobs at the fake, each with a journal in the ledger."""
    settings = assistant()
    asked = request(dataset(folder / "frozen"), settings)
    fake.set(progress=["queued", "running"])
    trainer = wire(settings, folder / "home")
    trainer.poll(trainer.submit(asked))  # from here on it runs, with 120 events
    fake.clone(count - 1)
    ids = [job["id"] for job in fake.jobs]
    connection = Connection.of(settings).to_dict()
    same: dict[str, Any] = {
        **{"assistant": "dental", "tenant_id": None, "dataset_id": "ds", "dataset_fingerprint": "f1", "provider": "openai"},
        **{"base_model": asked.base_model, "hyperparameters": {}, "plan": {}},
    }
    for number, job_id in enumerate(ids):
        job = ledger.open_job({**same, "spec_hash": f"s{number}"})
        open_journal(ledger, job.id, connection, 72)
        LedgerJournal(ledger, job.id).save(run_key=job.id, create_started="x", provider_job_id=job_id)


def rows(rounds: int) -> list[Row]:
    """One row; for `benchmarks/run.py`."""
    os.environ["OPENAI_API_KEY"] = KEY
    with tempfile.TemporaryDirectory() as made, fake_provider.start() as fake:
        os.environ["OPENAI_BASE_URL"] = fake.url
        folder = Path(made)
        ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        open_jobs(fake, ledger, folder, JOBS)

        def connect(connection: Connection, journal: Journal) -> RemoteTrainer:
            return OpenAIWire(connection, Store(folder / "home"), journal)

        walls: list[float] = []

        def tick() -> None:
            start = time.monotonic()
            polled = poll(ledger, open_remote(ledger), connect, None, 60)
            walls.append(time.monotonic() - start)
            if len(polled) != JOBS or any(one.note for one in polled):
                raise AssertionError(f"{len(polled)} of {JOBS} jobs were reached")

        taken = cpu(tick, rounds)
        ledger.close()
    note = f"{min(walls):.1f} s by the clock, of the 60 that a tick has; SQLite ledger, state and newest events of each"
    met = taken <= MOST_SECONDS and min(walls) < 60
    return [
        Row(f"{JOBS} open jobs asked for in one tick", taken, bar=f"≤ {MOST_SECONDS:.0f} s of CPU, ≤ 60 s", met=met, note=note)
    ]
