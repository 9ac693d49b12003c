"""What Dagster adds to a training of a minute: the same spec by `python -m finetune_assets.worker` alone, and in a Dagster run.

Counted is the CPU time of Dagster's own process while it runs the asset: events, the Pipes reader, logs. What the worker itself
spends on messages (a line each five seconds) is within its own seconds, beside those of the worker alone. The run's storage is
SQLite on disk, as in a fresh store. (Annotations are evaluated here: Dagster reads those of the asset.)
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dagster as dg

from benchmarks.measure import ROOT, Row, peak_mb
from benchmarks.training import make_spec, training_data
from finetune_assets.resources import LauncherResource

EPOCHS = 7
"""About a minute of a core."""
MOST = 0.03


def rows(rounds: int) -> list[Row]:
    """One row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_data(folder)
        both = [  # in turns: a busy machine disturbs both alike
            (_alone(make_spec(folder, f"alone-{n}", EPOCHS)), _orchestrated(make_spec(folder, f"run-{n}", EPOCHS)))
            for n in range(rounds)
        ]
    alone, measured = statistics.median(one for one, _ in both), [run for _, run in both]
    own, child = statistics.median(one[0] for one in measured), statistics.median(one[1] for one in measured)
    return [
        Row(
            "a training in a Dagster run",
            own + child,
            "the worker alone",
            alone,
            peak_mb(),
            f"< {MOST:.0%} in Dagster's process",
            own / child < MOST,
            f"{own:.2f} s in Dagster's process, {100 * own / child:.1f} % of the worker's {child:.1f} s",
        )
    ]


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _alone(spec: Path) -> float:
    before = _children()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finetune_assets.worker", str(spec)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return _children() - before


def _orchestrated(spec: Path) -> tuple[float, float]:
    """CPU seconds of this process and of the worker."""

    @dg.asset
    def trained(context: dg.AssetExecutionContext, launcher: LauncherResource) -> dg.MaterializeResult[Any]:
        launcher.run(context, spec, spec.parent)
        return dg.MaterializeResult()

    own, child = time.process_time(), _children()
    with tempfile.TemporaryDirectory() as home, dg.DagsterInstance.local_temp(home) as instance:
        dg.materialize([trained], instance=instance, resources={"launcher": LauncherResource()})
    return time.process_time() - own, _children() - child
