"""One tick of the sensor over 200 open jobs at a provider: CPU of asking, reading their metrics and writing all of it down.

    python benchmarks/run.py polling

The tick is the whole of `finished_jobs`, as the daemon runs it. The provider is the tests' stateful fake, a process of its own
on a socket: its CPU is not counted. All jobs run, so each is asked for its state and for its newest events. Wall time is shown
beside the minute that a tick has.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path

import dagster as dg
import sqlalchemy as sa

from benchmarks.measure import Row, cpu
from finetune_assets.registry import Ledger
from finetune_assets.registry.tables import now, remote_jobs
from finetune_assets_tests.training import fake_provider, many_jobs
from finetune_assets_tests.training.fake_provider.process import KEY

JOBS = 200
ASSISTANTS = tuple(f"assistant_{number}" for number in range(20))
MOST_SECONDS = 5.0


def rows(rounds: int) -> list[Row]:
    """One row; for `benchmarks/run.py`."""
    logging.disable(logging.INFO)  # a line a job
    os.environ["OPENAI_API_KEY"] = KEY
    with tempfile.TemporaryDirectory() as made, fake_provider.start() as fake:
        os.environ["OPENAI_BASE_URL"] = fake.url
        folder = Path(made)
        url = f"sqlite:///{folder / 'ledger.db'}"
        ledger = Ledger(url)
        many_jobs.open_jobs(fake, ledger, folder, JOBS, ASSISTANTS)
        (folder / "dagster").mkdir()
        walls: list[float] = []
        with dg.DagsterInstance.local_temp(str(folder / "dagster"), overrides={"telemetry": {"enabled": False}}) as instance:
            instance.add_dynamic_partitions("assistant", list(ASSISTANTS))

            def tick() -> None:
                with ledger.engine.begin() as connection:
                    connection.execute(sa.update(remote_jobs).values(next_poll_at=now()))
                start = time.monotonic()
                made = many_jobs.tick(instance, folder / "home", url)
                walls.append(time.monotonic() - start)
                if len(made.asset_events) != JOBS:
                    raise AssertionError(f"{len(made.asset_events)} of {JOBS} jobs were reached")

            taken = cpu(tick, rounds)
        ledger.close()
    note = f"{min(walls):.1f} s by the clock, of the 60 that a tick has; SQLite ledger, state and newest events of each"
    met = taken <= MOST_SECONDS and min(walls) < 60
    bar = f"≤ {MOST_SECONDS:.0f} s of CPU, ≤ 60 s"
    return [Row(f"{JOBS} open jobs in one tick of the sensor", taken, bar=bar, met=met, note=note)]
