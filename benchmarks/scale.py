"""Large exports with known truth, made from real ones by perturbation; and what the corpus assets cost on them.

    python benchmarks/scale.py make FOLDER --conversations 100000 [--weeks 52]   writes the export, a file a table and week
    python benchmarks/scale.py run FOLDER HOME                                  stale weeks, then the three corpus assets
    python benchmarks/scale.py history                                          a new week after 4 and after 52 weeks

`make` copies the conversations of a real export again and again: new ids and users, times spread evenly over the weeks, a number
in each message replaced by another one, and a word of some messages changed, so that copies are near-duplicates of each other
as they are in a chat of templates, and texts are mostly distinct. `run` prints JSON: seconds, CPU seconds, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent
SGD = ROOT.parent / "shared" / "data" / "sgd"
SAMPLE = ROOT / "data" / "sample"
FIRST = datetime(2025, 9, 1, tzinfo=UTC)  # a Monday
TABLES = ("conversations", "messages", "feedback")


def base() -> dict[str, pl.DataFrame]:
    """A real export without its planted broken rows: every row belongs to a whole conversation."""
    folder = SGD if SGD.is_dir() else SAMPLE
    c, m, f = (pl.read_parquet(folder / f"{table}.parquet") for table in TABLES)
    c = c.unique("conversation_id", keep="first", maintain_order=True)
    m = m.unique("message_id", keep="first", maintain_order=True).join(c, on="conversation_id", how="semi").drop_nulls("content")
    f = f.unique("feedback_id", keep="first", maintain_order=True).join(m, on="message_id", how="semi")
    return {"conversations": c, "messages": m, "feedback": f}


def make(folder: Path, conversations: int, weeks: int, seed: int = 1) -> dict[str, int]:
    """Writes the export; gives the rows of each table."""
    tables, rng = base(), np.random.default_rng(seed)
    c, written = tables["conversations"], dict.fromkeys(TABLES, 0)
    share = conversations / weeks
    for week in range(weeks):
        first, last = round(week * share), round((week + 1) * share)
        numbers = np.arange(first, last)
        picked = pl.DataFrame(
            {"copy": numbers, "of": numbers % c.height, "at": np.sort(rng.uniform(0, 6.9 * 86400, len(numbers)))}
        )
        start = FIRST + timedelta(weeks=week)
        begun = pl.lit(start).dt.cast_time_unit("us") + pl.duration(microseconds=(pl.col("at") * 1e6).cast(pl.Int64))
        copies = picked.join(c.with_row_index("of").with_columns(pl.col("of").cast(pl.Int64)), on="of").with_columns(
            (begun - pl.col("started_at")).alias("shift")
        )
        suffix = pl.concat_str(pl.lit("_"), pl.col("copy").cast(pl.String))
        shifts = copies.select("conversation_id", "copy", "shift")
        made = {
            "conversations": copies.with_columns(
                pl.col("user_id") + suffix, pl.col("started_at") + pl.col("shift"), pl.col("ended_at") + pl.col("shift")
            ),
            "messages": _perturbed(tables["messages"].join(shifts, on="conversation_id"), rng),
            "feedback": tables["feedback"].join(shifts, on="conversation_id"),
        }
        for table, frame in made.items():
            ids = [name for name in ("conversation_id", "message_id", "feedback_id") if name in frame.columns]
            moved = ["created_at"] if table != "conversations" else []
            whole = frame.with_columns(
                *(_uuid(pl.col(name) + suffix).alias(name) for name in ids), *(pl.col(name) + pl.col("shift") for name in moved)
            )
            target = folder / table / f"{start:%Y-%m-%d}.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            whole.select(tables[table].columns).write_parquet(target)
            written[table] += whole.height
    return written


def _uuid(text: pl.Expr) -> pl.Expr:
    """A UUID for each text, as most platforms have for ids."""
    numbers = [
        text.hash(seed).map_batches(lambda s: pl.Series([f"{n:016x}" for n in s]), return_dtype=pl.String) for seed in (1, 2)
    ]
    both = numbers[0] + numbers[1]
    return pl.concat_str([both.str.slice(a, n) for a, n in ((0, 8), (8, 4), (12, 4), (16, 4), (20, 12))], separator="-")


def _perturbed(messages: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    words = np.array(["hoy", "luego", "mañana", "gracias", "ok", "vale", "please", "thanks", "sure", "now"])
    number = pl.Series(rng.integers(1, 9999, messages.height).astype(str))
    word = pl.Series(words[rng.integers(0, len(words), messages.height)])
    return messages.with_columns(pl.col("content").str.replace(r"\d+", number).add(" ").add(word).alias("content"))


def _used() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def run(source: str, home: Path, threads: int) -> dict[str, Any]:
    """Stale weeks and the three corpus assets, in this process."""
    os.environ.setdefault("POLARS_MAX_THREADS", str(threads))
    from finetune_assets.corpus.examples import build_examples
    from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
    from finetune_assets.corpus.sources import read_source
    from finetune_assets.storage import Store

    store, steps = Store(home), dict[str, dict[str, float]]()

    def timed(name: str, work: Any) -> Any:
        wall, cpu = _used()
        result = work()
        steps[name] = {"seconds": round(_used()[0] - wall, 2), "cpu_seconds": round(_used()[1] - cpu, 2), "peak_mb": peak()}
        return result

    opened = timed("open", lambda: read_source([source]))
    weeks = timed("stale_weeks", lambda: stale_weeks(store, opened)).stale
    timed("raw_conversations", lambda: ingest_conversations(store, opened, weeks, b"key"))
    timed("rlhf_feedback", lambda: ingest_feedback(store, opened, weeks, b"key"))
    timed("clean_examples", lambda: build_examples(store, weeks))
    total = sum(step["cpu_seconds"] for step in steps.values())
    return {"weeks": len(weeks), "cpu_seconds": round(total, 2), "peak_mb": peak(), "steps": steps}


def peak() -> int:
    """The most memory of this program in MB; `ru_maxrss` would count what its parent held when it was started."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
    held = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(held.split()[1]) // 1024


def history(conversations_a_week: int = 500) -> dict[str, Any]:
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
            child("run", str(source), str(home))
            for table in TABLES:
                (held / f"{table}.parquet").rename(source / table / f"{newest}.parquet")
            found[f"after_{weeks}"] = child("run", str(source), str(home))
    few, many = found["after_4"], found["after_52"]
    found["ratio"] = {name: round(many[name] / few[name], 2) for name in ("cpu_seconds", "peak_mb")}
    return found


def child(*arguments: str) -> dict[str, Any]:
    """Runs this file in a process of its own; its JSON."""
    command = [sys.executable, str(Path(__file__)), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return json.loads(done.stdout)


def main() -> None:
    """The three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make")
    made.add_argument("folder", type=Path)
    made.add_argument("--conversations", type=int, default=100_000)
    made.add_argument("--weeks", type=int, default=52)
    ran = commands.add_parser("run")
    ran.add_argument("source")
    ran.add_argument("home", type=Path)
    ran.add_argument("--threads", type=int, default=1)
    commands.add_parser("history")
    given = parser.parse_args()
    if given.command == "make":
        print(json.dumps(make(given.folder, given.conversations, given.weeks)))
    elif given.command == "run":
        print(json.dumps(run(given.source, given.home, given.threads), indent=1))
    else:
        print(json.dumps(history(), indent=1))


if __name__ == "__main__":
    main()
