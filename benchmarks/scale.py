"""What 100,000 and 1,000,000 conversations cost, and a new week after 4 and after 52 weeks of history.

    python -m benchmarks.scale run FOLDER HOME [--memory GB]     an export of `benchmarks.exports`, each step measured
    python -m benchmarks.scale history                           a new week after 4 and after 52 weeks
    python -m benchmarks.scale million                           1,000,000 conversations with FINETUNE_MEMORY_GB=3

`run` prints JSON: CPU seconds and peak memory of each step, on one core, in a process of its own; compiling and imports are not
counted, reading the source and writing the frozen data set are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.exports import FIRST, MADE, TABLES, make
from benchmarks.measure import ROOT, Row, peak_mb

WEEKS = 12  # of the real export that the copies are made of
MESSAGES = 12  # after which a conversation is cut: so 100,000 have the bar's 600,000 examples


def rows(rounds: int) -> list[Row]:
    """100,000 conversations that are cut, 100,000 whole ones and a million cut ones, once each; then the histories, the median
    ratio of `rounds`."""
    seconds, memory = "≤ 15 CPU-seconds on one core within 1,500 MB", "within 3,000 MB"
    made = [measured(100_000, MESSAGES, seconds), measured(100_000, None), measured(1_000_000, MESSAGES, memory)]
    made[0] = replace(made[0], met=made[0].cpu_seconds <= 15 and (made[0].peak_mb or 0) <= 1_500)
    made[2] = replace(made[2], met=(made[2].peak_mb or 0) <= 3_000)
    found = sorted((history() for _ in range(rounds)), key=lambda one: one["ratio"]["cpu_seconds"])[rounds // 2]
    few, many = found["after_4"], found["after_52"]
    ratios = found["ratio"]
    note = f"{MADE}; after 4 weeks {few['cpu_seconds']} s and {few['peak_mb']} MB; "
    note += f"ratios {ratios['cpu_seconds']} and {ratios['peak_mb']}"
    met = max(ratios.values()) <= 1.3
    what = f"corpus assets of a new week of {WEEKLY} conversations after 52 weeks"
    return [*made, Row(what, many["cpu_seconds"], peak_mb=many["peak_mb"], bar="≤ 1.3 × after 4 weeks", met=met, note=note)]


def measured(conversations: int, messages: int | None, bar: str = "") -> Row:
    """From export to frozen JSONL; FINETUNE_MEMORY_GB is 1, and 3 for a million conversations, which are those of a year."""
    large = conversations >= 1_000_000
    with tempfile.TemporaryDirectory(prefix="finetune-scale-") as name:
        source, home = Path(name) / "source", Path(name) / "home"
        make(source, conversations, 52 if large else WEEKS, messages)
        found = child("run", str(source), str(home), "--memory", "3" if large else "1")
    examples, seconds = found["examples"], found["cpu_seconds"]
    truth = ", ".join(f"{one['what']} {one['share']:.2%}" for one in found["truth"])
    steps = ", ".join(f"{step} {numbers['cpu_seconds']}" for step, numbers in found["steps"].items())
    note = f"{MADE}; {found['rows']:,} rows frozen, {1e6 * seconds / examples:.1f} µs an example; {steps}; {truth}"
    what = f"{conversations:,} conversations, {examples:,} examples: export to frozen JSONL"
    return Row(what, seconds, peak_mb=found["peak_mb"], bar=bar, note=note)


def run(source: str, home: Path, weeks_only: bool = False) -> dict[str, Any]:
    """Stale weeks, the three corpus assets, and with all of it (`weeks_only` false) the data set, in this process."""
    import numpy as np

    from benchmarks.pipeline import EVERYONE
    from benchmarks.truth import compared
    from finetune_assets.corpus.examples import build_examples
    from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
    from finetune_assets.corpus.near_duplicates import drop_near_duplicates
    from finetune_assets.corpus.sources import read_source
    from finetune_assets.dataset import choose, freeze
    from finetune_assets.storage import Store

    if not weeks_only:
        drop_near_duplicates([f"hola {n}" for n in range(200)], np.arange(200))  # compiles
    store, steps = Store(home), dict[str, dict[str, float]]()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        wall, used = time.perf_counter(), time.process_time()
        result = work()
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - used}
        steps[name] = {**{what: round(taken, 2) for what, taken in spent.items()}, "peak_mb": peak_mb()}
        print(name, steps[name], file=sys.stderr, flush=True)
        return result

    def ingested() -> list[str]:  # lets the source go at its end, as the assets do
        opened = timed("open", lambda: read_source([source]))
        weeks = timed("stale_weeks", lambda: stale_weeks(store, opened)).stale
        timed("raw_conversations", lambda: ingest_conversations(store, opened, weeks, b"key"))
        timed("rlhf_feedback", lambda: ingest_feedback(store, opened, weeks, b"key"))
        return weeks

    weeks = ingested()
    timed("clean_examples", lambda: build_examples(store, weeks))
    found: dict[str, Any] = {"weeks": len(weeks)}
    choice = None
    if not weeks_only:
        choice = timed("training_examples", lambda: choose(store, EVERYONE))
        made = timed("jsonl_splits", lambda: freeze(store, EVERYONE, choice))
        found |= {"examples": made["read"], "rows": choice.kept.height, "fingerprint": made["fingerprint"]}
    found |= {"cpu_seconds": round(sum(step["cpu_seconds"] for step in steps.values()), 2), "peak_mb": peak_mb(), "steps": steps}
    if choice is not None:
        found["truth"] = [
            {"what": one.what, "share": one.share, "planted": one.planted} for one in compared(Path(source), store, choice.kept)
        ]
    return found


WEEKLY = 529  # conversations: a quarter of the real export, so that the newest week holds nearly the same ones in both histories


def history(conversations_a_week: int = WEEKLY) -> dict[str, Any]:
    """Time and memory of one new week after 4 and after 52 weeks, each in a process of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="finetune-scale-") as folder:
        for weeks in (4, 52):
            source, home = Path(folder) / f"source{weeks}", Path(folder) / f"home{weeks}"
            make(source, conversations_a_week * (weeks + 1), weeks + 1)
            newest = f"{FIRST + timedelta(weeks=weeks):%Y-%m-%d}"
            held = Path(folder) / "held"
            held.mkdir(exist_ok=True)
            for table in TABLES:
                (source / table / f"{newest}.parquet").rename(held / f"{table}.parquet")
            child("run", str(source), str(home), "--weeks-only")
            for table in TABLES:
                (held / f"{table}.parquet").rename(source / table / f"{newest}.parquet")
            found[f"after_{weeks}"] = child("run", str(source), str(home), "--weeks-only")
    few, many = found["after_4"], found["after_52"]
    found["ratio"] = {name: round(many[name] / few[name], 2) for name in ("cpu_seconds", "peak_mb")}
    return found


def child(*arguments: str) -> dict[str, Any]:
    """Runs this file in a process of its own, on one core; its JSON."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "POLARS_MAX_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(done.stdout)


def main() -> None:
    """The commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ran = commands.add_parser("run")
    ran.add_argument("source")
    ran.add_argument("home", type=Path)
    ran.add_argument("--weeks-only", action="store_true", help="no data set")
    ran.add_argument("--memory", type=float, help="GB, as FINETUNE_MEMORY_GB")
    commands.add_parser("history")
    commands.add_parser("million")
    given = parser.parse_args()
    if given.command == "run":
        if given.memory:
            os.environ["FINETUNE_MEMORY_GB"] = str(given.memory)
        print(json.dumps(run(given.source, given.home, given.weeks_only), indent=1))
    else:
        print(json.dumps(history() if given.command == "history" else asdict(measured(1_000_000, MESSAGES)), indent=1))


if __name__ == "__main__":
    main()
