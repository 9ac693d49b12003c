"""Reading a million messages of a real Postgres (`pgserver`), beside `pandas.read_sql`; each in a process of its own.

python benchmarks/databases.py URL ours|pandas      one reading; prints {"rows", "cpu_seconds", "peak_mb"}
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.exports import MADE, make
from benchmarks.measure import ROOT, Row, peak_mb

MESSAGES = 1_000_000
COLUMNS = "message_id, conversation_id, role, content, intent, created_at"


def rows(rounds: int) -> list[Row]:
    """CPU seconds and peak memory of the reading process; the server's are not counted."""
    try:
        import pgserver  # noqa: F401
    except ImportError:
        return [Row("messages from Postgres, 1M", 0.0, "pandas.read_sql", note="pgserver is not installed")]
    from finetune_assets_tests.corpus.postgres import server

    with tempfile.TemporaryDirectory() as folder, server() as postgres:
        make(Path(folder), MESSAGES // 19, 4)
        url = postgres.fill("bench", Path(folder))
        ours, theirs = ([_child(url, who) for _ in range(rounds)] for who in ("ours", "pandas"))
    mine, peer = (statistics.median(one["cpu_seconds"] for one in found) for found in (ours, theirs))
    most = max(one["peak_mb"] for one in ours)
    return [
        Row(
            "messages from Postgres, 1M",
            mine,
            "pandas.read_sql",
            peer,
            most,
            "≥ 3×, ≤ 300 MB",
            peer >= 3 * mine and most <= 300,
            f"{MADE}; {ours[0]['rows']:,} rows in typed batches; pandas held {max(one['peak_mb'] for one in theirs):,} MB",
        )
    ]


def _child(url: str, who: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.databases", url, who]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def read(url: str, who: str) -> dict[str, Any]:
    """One reading of the table `messages`."""
    start, count = time.process_time(), 0
    if who == "ours":
        from finetune_assets.corpus.sources import read_source

        source = read_source([url])
        for part in source.of("messages"):
            for frame, _ in part.read():
                count += frame.select(pl.len()).item()
        source.close()
    else:
        import pandas as pd
        import sqlalchemy as sa

        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg2:"))
        count = len(pd.read_sql(f"SELECT {COLUMNS} FROM messages", engine))
    return {"rows": count, "cpu_seconds": round(time.process_time() - start, 3), "peak_mb": peak_mb()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(read(*sys.argv[1:3])) + "\n")
