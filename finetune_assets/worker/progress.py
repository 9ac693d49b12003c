"""Progress of a task: one JSON line a step in `<output>/progress.jsonl`, a line on stderr, a line in the run's log.

Under Dagster Pipes the log line goes to the run; elsewhere the files alone tell.
"""

from __future__ import annotations

import errno
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from dagster_pipes import PipesContext

from finetune_assets.worker import ranks

TERMINAL_SECONDS = 2.0
LOG_SECONDS = 5.0
UNITS = {
    "tokens_per_second": "{:,.0f} tokens/s",
    "memory_gib": "{:.2f} GiB",
    "gpu_percent": "GPU {:.0f} %",
    "gpu_celsius": "{:.0f} °C",
}
"""How a line shows numbers that have a unit."""


class Progress:
    """Reports where a task is. Cheap: a line in a file, and a few lines a minute elsewhere."""

    def __init__(self, output: Path):
        """`output`: the task's folder, which exists."""
        self._file = output / "progress.jsonl"
        self._stage = ""
        self._start = (0.0, 0)  # time and step at which the stage began here: a resumed one does not begin at 0
        self._shown = 0.0
        self._logged = 0.0

    @classmethod
    def open(cls, output: Path) -> Progress:
        """Progress of the task that writes to `output`."""
        output.mkdir(parents=True, exist_ok=True)
        return cls(output)

    def update(self, stage: str, step: int, total: int, **numbers: float | str | None) -> None:
        """`step` of `total` is done. `numbers`: e.g. loss, tokens_per_second; `seconds_left` is worked out unless given."""
        if not ranks.first():
            return
        now = time.time()
        fresh = stage != self._stage
        if fresh:
            self._stage, self._start = stage, (now, step)
        began, first = self._start
        if "seconds_left" not in numbers:
            numbers["seconds_left"] = (total - step) * (now - began) / (step - first) if step > first else None
        numbers = {name: None if isinstance(n, float) and not math.isfinite(n) else n for name, n in numbers.items()}
        self._append({"time": round(now, 3), "stage": stage, "step": step, "total": total, **numbers})
        last = step >= total
        if fresh or last or now - self._shown >= TERMINAL_SECONDS:
            self._shown = now
            sys.stderr.write(_line(stage, step, total, numbers) + "\n")
            sys.stderr.flush()
        if fresh or last or now - self._logged >= LOG_SECONDS:
            self._logged = now
            log(_line(stage, step, total, numbers))

    def note(self, message: str) -> None:
        """A sentence for people: a warning, or what was decided."""
        if not ranks.first():
            return
        self._append({"time": round(time.time(), 3), "stage": self._stage, "note": message})
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        log(message)

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk must not end a task that may still make room; the terminal and the run's log tell
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise


def log(message: str) -> None:
    """One line in the log of the Dagster run that started this process; nothing elsewhere."""
    if PipesContext.is_initialized():
        PipesContext.get().log.info(message)


def _line(stage: str, step: int, total: int, numbers: dict[str, float | str | None]) -> str:
    """E.g. `train 120/562 · loss 1.23 · 4,100 tokens/s · 0:41 left`."""
    parts = [f"{stage} {step:,}/{total:,}"]
    for name, value in numbers.items():
        if value is None or name == "seconds_left":
            continue
        if name in UNITS:
            parts.append(UNITS[name].format(value))
        else:
            parts.append(
                f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
            )
    left = numbers.get("seconds_left")
    if isinstance(left, int | float) and step < total:
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return " · ".join(parts)
