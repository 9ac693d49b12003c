"""How a benchmark measures and what it answers: `cpu`, `peak_mb` and `Row`."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data" / "sample"


@dataclass(frozen=True)
class Row:
    """One line of the table. A peer that cannot be measured here has no seconds and says why in `note`."""

    what: str
    cpu_seconds: float
    peer: str | None = None
    peer_cpu_seconds: float | None = None
    peak_mb: int | None = None  # of the process that did our part
    bar: str = ""  # what was promised, in words
    met: bool | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times less CPU time ours takes."""
        return self.peer_cpu_seconds / self.cpu_seconds if self.peer_cpu_seconds and self.cpu_seconds else None


def cpu(work: Callable[[], Any], rounds: int) -> float:
    """Median CPU seconds of some work in this process, all threads: other processes disturb it little."""
    taken: list[float] = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def peak_mb() -> int:
    """The most memory this process held since it began, in MB. Each benchmark module has a process of its own."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 1024
