"""A training killed with SIGKILL at ten random moments, beside the same training left alone.

The work that a kill loses is the time from the newest whole checkpoint (or from the first step of that start) to the kill. The
moments are drawn by a fixed seed, all of them later after a start's first step than a kill may cost: without checkpoints each
would cost more.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Row, peak_mb
from finetune_assets.storage import TEMPORARY, read_json, write_json
from finetune_assets.worker import checkpoints
from finetune_assets.worker.watch import CHECKPOINT_SHARE

KILLS = 10
EPOCHS = 12
INTERVAL = 2.0
"""Seconds between checkpoints."""
WRITING = 2.0
"""Seconds that may pass until a checkpoint is on disk, on a busy machine."""


@dataclass
class Killed:
    """What came of a training that was killed again and again."""

    lost: list[float] = field(default_factory=list[float])
    """Seconds of work that each kill cost."""
    intervals: list[float] = field(default_factory=list[float])
    """Seconds between checkpoints at each kill: longer than asked where writing one would take too large a share of the time."""
    broken: list[str] = field(default_factory=list[str])
    """Files that are not whole at the end."""


def rows(rounds: int) -> list[Row]:
    """One row; `rounds` is not used: ten kills are enough of them."""
    from benchmarks.training import make_spec, training_data

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_data(folder)
        whole, spec = (make_spec(folder, kind, EPOCHS) for kind in ("whole", "killed"))
        before = _children()
        start(whole).wait()
        alone = _children() - before
        write_json(spec, {**read_json(spec), "checkpoint_seconds": INTERVAL})
        seen = killed(spec, KILLS, random.Random(42), moments(INTERVAL, WRITING))
        taken = _children() - before - alone
        results = [read_json(one.parent / "result.json") for one in (whole, spec)]
    same = all(results[0][name] == results[1][name] for name in ("model_sha256", "steps", "tokens", "train_loss"))
    enough = len(seen.lost) == KILLS
    longest = max(seen.intervals, default=INTERVAL)
    within = all(lost <= interval + WRITING for lost, interval in zip(seen.lost, seen.intervals, strict=True))
    good = same and enough and not seen.broken and within
    return [
        Row(
            f"a training killed {len(seen.lost)} times at random moments",
            taken,
            "the same, left alone",
            alone,
            peak_mb(),
            f"at most one interval of {INTERVAL:g} s lost, or as long as {CHECKPOINT_SHARE:.0%} of the time for writing makes it "
            f"(and {WRITING:g} s to write it), same model, no broken file",
            good,
            f"{max(seen.lost, default=0):.1f} s lost at most, {sum(seen.lost) / max(len(seen.lost), 1):.1f} s on average, the "
            f"longest interval {longest:.1f} s; training loss "
            f"{results[1]['train_loss']:.4f} and {results[0]['train_loss']:.4f}; weights {'identical' if same else 'DIFFERENT'}; "
            f"broken files: {len(seen.broken)}",
        )
    ]


def moments(interval: float, writing: float) -> tuple[float, float]:
    """Seconds after a start's first step between which it is killed: two intervals, later than what a kill may cost."""
    return interval + writing + 0.5, 3 * interval + writing + 0.5


def killed(spec: Path, kills: int, chance: random.Random, between: tuple[float, float]) -> Killed:
    """Starts the spec, kills it `kills` times, `between` these seconds after each start's first step, and lets it end."""
    output, seen, interval = Path(read_json(spec)["output"]), Killed(), float(read_json(spec)["checkpoint_seconds"])
    while not (output / "result.json").exists():
        child = start(spec)
        if len(seen.lost) < kills:
            wait_for_a_step(output, child)
            began = time.time()
            time.sleep(chance.uniform(*between))
            if child.poll() is None:
                os.kill(child.pid, signal.SIGKILL)
                now = time.time()
                child.wait()
                taken, between_two = _newest(output, interval)
                seen.lost.append(now - max(began, taken))
                seen.intervals.append(between_two)
        if child.wait() not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the training of {spec} failed: {(output / 'error.json').read_text(encoding='utf-8')}")
    left = [str(file) for file in output.rglob(f"{TEMPORARY}*")]
    seen.broken = left + ([] if checkpoints.is_whole(output / "model") else [str(output / "model")])
    return seen


def start(spec: Path) -> subprocess.Popen[bytes]:
    """A worker."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finetune_assets.worker", str(spec)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)


def wait_for_a_step(output: Path, child: subprocess.Popen[Any]) -> None:
    """Until this start has reported a step."""
    before = _steps(output)
    while _steps(output) == before and child.poll() is None:
        time.sleep(0.01)


def _steps(output: Path) -> int:
    file = output / "progress.jsonl"
    return file.read_text(encoding="utf-8").count('"stage": "train"') if file.exists() else 0


def _newest(output: Path, interval: float) -> tuple[float, float]:
    """When the newest whole checkpoint was taken (0 without one), and the seconds between two of them then."""
    newest = max(
        (one for one in output.glob("stages/*/checkpoints/checkpoint-*") if checkpoints.is_whole(one)), key=_step, default=None
    )
    if newest is None:
        return 0.0, interval
    writing = float(read_json(newest / "totals.json")["checkpoint_seconds"])
    return (newest / "totals.json").stat().st_mtime - writing, max(interval, writing / CHECKPOINT_SHARE)


def _step(checkpoint: Path) -> int:
    return checkpoints.step_of(checkpoint) or 0


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
