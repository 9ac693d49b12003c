"""Weeks of a corpus table in several workers at once: how they are shared out, and what comes back.

Each worker (`finetune_assets.worker.weeks`) has a run of neighbouring weeks, and writes them as one process alone would.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune_assets.storage import TEMPORARY, Store, read_json, write_json
from finetune_assets.workers import is_postgres

Counts = dict[str, dict[str, Any]]
Tasks = Sequence[tuple[Path, Path]]
"""Spec file and output folder of each."""


@dataclass(frozen=True)
class Reading:
    """What a worker needs to open the source as this process does. `sources`: null where their addresses may hold a secret."""

    sources: Sequence[str] | None
    assistants: Path
    erased: frozenset[str]

    @classmethod
    def of(cls, urls: Sequence[str], assistants: Path, erased: frozenset[str]) -> Reading:
        """Addresses of Postgres are left to the worker's environment: a password may stand in any part of them."""
        return cls(None if any(is_postgres(url) for url in urls) else list(urls), assistants, erased)


def shared_out(weeks: Sequence[str], workers: int) -> list[list[str]]:
    """The weeks, sorted, in runs of nearly equal length: as many as there are workers, none empty."""
    ordered = sorted(set(weeks))
    number = min(workers, len(ordered))
    edges = [round(place * len(ordered) / number) for place in range(number + 1)] if number else [0]
    return [ordered[start:end] for start, end in pairwise(edges)]


def in_workers(
    store: Store, table: str, weeks: Sequence[str], reading: Reading | None, workers: int, launch: Callable[[Tasks], None]
) -> Counts:
    """Builds the weeks by `launch`, which runs all tasks and raises LaunchError where one fails; the numbers of each week.

    A week that was written before another worker failed is whole and stays.
    """
    folder = store.home / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{TEMPORARY}weeks-") as name:
        tasks: list[tuple[Path, Path]] = []
        for number, own in enumerate(shared_out(weeks, workers)):
            output = Path(name) / f"{table}-{number}"
            spec: dict[str, Any] = {"task": "weeks", "output": str(output), "table": table, "weeks": own, "home": str(store.home)}
            if reading is not None:
                spec |= {
                    "sources": reading.sources,
                    "assistants": str(reading.assistants),
                    "erased": sorted(reading.erased),
                }
            write_json(output / "spec.json", spec)
            tasks.append((output / "spec.json", output))
        launch(tasks)
        counts: Counts = {}
        for _, output in tasks:
            counts |= read_json(output / "result.json")["counts"]
    return counts
