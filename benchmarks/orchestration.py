"""What orchestration adds to a training of a minute: the same spec by `python -m finetune_assets.worker` alone, and in a Dagster
run, in turns.

Counted is everything around the training, less the training alone: Dagster's own process while it runs the asset (instance,
events, the Pipes reader, logs) and what the worker spends on messages, by CPU time and by the clock. Each round gives one
difference, the median counts. The run's storage is SQLite on disk, as in a fresh store. The second row is what a run pays once,
whatever it materialises: its process starts, and loads Dagster and the project's definitions. (Annotations are evaluated here:
Dagster reads those of the asset.)
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from benchmarks.measure import ROOT, Row, peak_mb
from benchmarks.training import make_spec, training_data
from finetune_assets.resources import LauncherResource

EPOCHS = 7
"""About a minute of a core."""
MOST = 0.03
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Taken:
    """Seconds that some work took."""

    wall: float
    cpu: float
    """Of this process and its children."""
    own: float
    """Of this process."""


def rows(rounds: int) -> list[Row]:
    """The run beside the worker alone, and the start of a run's process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_data(folder)
        _alone(make_spec(folder, "warm", 0.1))  # the libraries are read from disk once, by neither of the two
        both: list[tuple[Taken, Taken]] = []
        for n in range(rounds):
            alone = _taken(_alone, make_spec(folder, f"alone-{n}", EPOCHS))
            both.append((alone, _taken(_orchestrated, make_spec(folder, f"run-{n}", EPOCHS))))
        starts = [_taken(_definitions, folder).cpu for _ in range(rounds)]
    added = [run.cpu - alone.cpu for alone, run in both]
    longer = [run.wall - alone.wall for alone, run in both]
    cpu, wall = (statistics.median(getattr(alone, name) for alone, _ in both) for name in ("cpu", "wall"))
    own = statistics.median(run.own for _, run in both)
    shares = statistics.median(added) / cpu, statistics.median(longer) / wall
    return [
        Row(
            "a training in a Dagster run",
            statistics.median(run.cpu for _, run in both),
            "the worker alone",
            cpu,
            peak_mb(),
            f"< {MOST:.0%} more, by CPU time and by the clock",
            max(shares) < MOST,
            f"{100 * shares[0]:+.1f} % of {cpu:.1f} CPU s ({_each(added)}; {own:.2f} s of it in Dagster's process), "
            f"{100 * shares[1]:+.1f} % of {wall:.1f} s by the clock ({_each(longer)})",
        ),
        Row(
            "start of a run's process: Dagster and the definitions",
            statistics.median(starts),
            peak_mb=peak_mb(),
            note="once a run, whatever it materialises",
        ),
    ]


def _each(seconds: list[float]) -> str:
    """What each round gave."""
    return ", ".join(f"{one:+.2f}" for one in seconds) + " s"


def _taken(work: Callable[[Path], None], where: Path) -> Taken:
    wall, own, children = time.perf_counter(), time.process_time(), _children()
    work(where)
    own = time.process_time() - own
    return Taken(time.perf_counter() - wall, own + _children() - children, own)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _alone(spec: Path) -> None:
    command = [sys.executable, "-m", "finetune_assets.worker", str(spec)]
    subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)


def _definitions(_folder: Path) -> None:
    subprocess.run([sys.executable, "-c", "import finetune_assets.definitions"], env=ENVIRONMENT, cwd=ROOT, check=True)


def _orchestrated(spec: Path) -> None:
    @dg.asset
    def trained(context: dg.AssetExecutionContext, launcher: LauncherResource) -> dg.MaterializeResult[Any]:
        launcher.run(context, spec, spec.parent)
        return dg.MaterializeResult()

    with tempfile.TemporaryDirectory() as home, dg.DagsterInstance.local_temp(home) as instance:
        dg.materialize([trained], instance=instance, resources={"launcher": LauncherResource()})
