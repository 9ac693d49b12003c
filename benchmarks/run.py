"""`make bench`: our parts beside a named peer on the same work, in the same run, one process after the other.

    python benchmarks/run.py [NAME …] [--rounds 3]

Prints a table of medians and ratios; writes `benchmarks/results.json` with versions, machine and command. NAME is a module of
this folder; with names, only their rows are replaced. Each figure is the median of `--rounds` repetitions in CPU seconds.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
RESULTS = ROOT / "benchmarks" / "results.json"
PACKAGES = ("polars", "pyarrow", "duckdb", "rapidfuzz", "numba", "torch", "transformers", "trl", "dagster")


def names() -> list[str]:
    """The benchmarks: every module beside this one that has a function `rows`."""
    found = (ROOT / "benchmarks").glob("*.py")
    return sorted(path.stem for path in found if "\ndef rows(" in path.read_text(encoding="utf-8"))


def rows_of(name: str, rounds: int) -> list[dict[str, Any]]:
    """What one benchmark measured, as JSON."""
    made = importlib.import_module(f"benchmarks.{name}").rows(rounds)
    return [{"benchmark": name, **asdict(row), "ratio": row.ratio and round(row.ratio, 2)} for row in made]


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """The same in a fresh process, so that neither memory nor threads of one benchmark show in another."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(rows_of, name, rounds).result()


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a reader."""
    lines = [f"{'what':<64}{'ours, s':>9}{'peer, s':>10}{'ratio':>9}{'MB':>7}  beside, bar, note"]
    for row in rows:
        ours = f"{row['cpu_seconds']:.3f}"
        peer = "-" if row["peer_cpu_seconds"] is None else f"{row['peer_cpu_seconds']:.3f}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.1f}×"
        met = {True: "met", False: "MISSED", None: ""}[row["met"]]
        rest = "; ".join(part for part in (row["peer"], f"{row['bar']} {met}".strip(), row["note"]) if part)
        lines.append(f"{row['what']:<64}{ours:>9}{peer:>10}{ratio:>9}{row['peak_mb'] or '-':>7}  {rest}")
    return "\n".join(lines)


def about(command: str, packages: Sequence[str]) -> dict[str, Any]:
    """What results were made with: command, date, machine, versions."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: installed(name) for name in packages},
    }


def main() -> None:
    """Runs what was asked for and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names())}; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(names()):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen = asked.names or names()
    fresh = [row for name in chosen for row in measure(name, asked.rounds)]
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if asked.names and RESULTS.exists() else []
    kept = [row for row in before if row["benchmark"] not in chosen and row["benchmark"] in names()]
    rows = sorted([*kept, *fresh], key=lambda row: row["benchmark"])
    results = {**about(f"python benchmarks/run.py --rounds {asked.rounds}", PACKAGES), "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(fresh))


if __name__ == "__main__":
    main()
