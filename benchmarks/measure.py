"""How a benchmark measures and what it answers: `cpu`, `peak_mb`, `peer` and `Row`.

Peers that are no dependency run in the interpreter that BENCH_PEERS names, e.g. of a virtual environment with
`pip install pandas pyarrow datasketch phonenumbers rensa rapidfuzz text-dedup datatrove spacy nltk tokenizers`;
else their rows say `not installed`.
"""

from __future__ import annotations

import json
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
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held when it started this process
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) // 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 1024


def peers_python() -> str:
    """The interpreter that has the peers: BENCH_PEERS, by default this one."""
    return os.environ.get("BENCH_PEERS") or sys.executable


def peer(script: str, *arguments: str) -> dict[str, Any] | str:
    """What `peers/<script>.py ARGUMENTS OUT` wrote into OUT, or why it could not: `not installed`, or its last line."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [peers_python(), str(ROOT / "benchmarks" / "peers" / f"{script}.py"), *arguments, str(out)]
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode == 0:
            return json.loads(out.read_text(encoding="utf-8"))
        last = done.stderr.strip().splitlines()[-1]
        return "not installed" if last.startswith(("ModuleNotFoundError", "ImportError")) else last[:120]
