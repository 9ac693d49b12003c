"""What orchestration adds to a training of a minute: the same spec by `python -m finetune_assets.worker` alone, and in a Dagster
run, in turns.

Counted is what lies outside of the training's loop, by the clock, in the run less alone: Dagster's events, the Pipes reader,
logs, the start and end of the step. Beside it, Dagster's own process by CPU time. The loop itself runs the same code in both,
and the same loop differs by more from one minute to the next on a shared machine than orchestration costs, so its time is not
in the difference; the note has the whole one too. The two take turns in going first. The instance (SQLite on disk) exists
already, as it does in use. The second row is what a run pays once, whatever it materialises: its process starts, and loads
Dagster and the project's definitions. (Annotations are evaluated here: Dagster reads those of the asset.)
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dagster as dg

from benchmarks.measure import ROOT, Row, peak_mb
from benchmarks.training import make_spec, training_data
from finetune_assets.resources import LauncherResource

EPOCHS = 4
"""About a minute."""
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
    loop: float = 0.0
    """Of the training's loop, by the clock."""

    @property
    def around(self) -> float:
        """By the clock, outside of the loop."""
        return self.wall - self.loop


def rows(rounds: int) -> list[Row]:
    """The run beside the worker alone, and the start of a run's process."""
    with TemporaryDirectory() as name, TemporaryDirectory() as home, dg.DagsterInstance.local_temp(home) as instance:
        folder = Path(name)
        training_data(folder)
        work: dict[str, Callable[[Path], None]] = {"alone": _alone, "run": lambda spec: _orchestrated(spec, instance)}
        both: list[dict[str, Taken]] = []
        for kind, start in work.items():  # the libraries are read from disk, the database is written
            start(make_spec(folder, f"warm-{kind}", 0.1))
        for n in range(rounds):
            order = sorted(work, reverse=bool(n % 2))
            both.append({kind: _trained(work[kind], make_spec(folder, f"{kind}-{n}", EPOCHS)) for kind in order})
        starts = [_taken(_definitions, folder).cpu for _ in range(rounds)]
    around = [one["run"].around - one["alone"].around for one in both]
    whole = [one["run"].wall - one["alone"].wall for one in both]
    alone = statistics.median(one["alone"].wall for one in both)
    own = statistics.median(one["run"].own for one in both)
    share = max(statistics.median(around), own) / alone
    return [
        Row(
            "a training in a Dagster run",
            statistics.median(one["run"].cpu for one in both),
            "the worker alone",
            statistics.median(one["alone"].cpu for one in both),
            peak_mb(),
            f"< {MOST:.0%} more",
            share < MOST,
            f"{100 * share:+.1f} % of {alone:.1f} s: around the loop {_each(around)} by the clock, {own:.2f} CPU s in "
            f"Dagster's process; "
            f"with the loop's own variation {_each(whole)}",
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


def _trained(work: Callable[[Path], None], spec: Path) -> Taken:
    """`_taken`, with the seconds of the loop that the worker wrote down."""
    taken = _taken(work, spec)
    return replace(taken, loop=json.loads((spec.parent / "result.json").read_text("utf-8"))["seconds"])


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _alone(spec: Path) -> None:
    command = [sys.executable, "-m", "finetune_assets.worker", str(spec)]
    subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)


def _definitions(_folder: Path) -> None:
    subprocess.run([sys.executable, "-c", "import finetune_assets.definitions"], env=ENVIRONMENT, cwd=ROOT, check=True)


def _orchestrated(spec: Path, instance: dg.DagsterInstance) -> None:
    @dg.asset
    def trained(context: dg.AssetExecutionContext, launcher: LauncherResource) -> dg.MaterializeResult[Any]:
        launcher.run(context, spec, spec.parent)
        return dg.MaterializeResult()

    dg.materialize([trained], instance=instance, resources={"launcher": LauncherResource()})
