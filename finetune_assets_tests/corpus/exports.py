"""Small exports for tests: rows with defaults for what a test does not say, written in any format."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.corpus.schema import SOURCE, TABLES

SGD = Path(__file__).parents[2] / ".." / "shared" / "data" / "sgd"
START = datetime(2026, 9, 7, 9, 0, tzinfo=UTC)  # a Monday
KEY = b"a key of the tests"
Row = dict[str, Any]
TYPES: dict[str, Any] = {
    "text": pl.String,
    "time": pl.Datetime("us", "UTC"),
    "score": pl.Int8,
    "flag": pl.Boolean,
    "aside": pl.String,
}


def at(weeks: float = 0, minutes: float = 0) -> datetime:
    return START + timedelta(weeks=weeks, minutes=minutes)


def conversation(number: int, **given: Any) -> Row:
    row = {
        "conversation_id": f"conv_{number:04d}",
        "tenant_id": "clinic_a",
        "user_id": f"user_{number:04d}",
        "vertical": "dental",
        "channel": "web",
        "satisfaction_score": 5,
        "started_at": at(minutes=number),
        "ended_at": at(minutes=number + 9),
    }
    return row | given


def message(number: int, conversation_number: int, **given: Any) -> Row:
    row = {
        "message_id": f"msg_{number:04d}",
        "conversation_id": f"conv_{conversation_number:04d}",
        "role": "user" if number % 2 == 0 else "assistant",
        "content": f"mensaje {number}",
        "intent": "scheduling" if number % 2 == 0 else None,
        "created_at": at(minutes=conversation_number + number / 100),
    }
    return row | given


def judgement(number: int, message_number: int, conversation_number: int, **given: Any) -> Row:
    row = {
        "feedback_id": f"fb_{number:04d}",
        "tenant_id": "clinic_a",
        "conversation_id": f"conv_{conversation_number:04d}",
        "message_id": f"msg_{message_number:04d}",
        "feedback_type": "positive",
        "rating": 5,
        "expected_response": None,
        "comment": None,
        "created_at": at(minutes=message_number + 60),
    }
    return row | given


def export(conversations: int = 3, turns: int = 4) -> dict[str, list[Row]]:
    """Well-formed tables: conversations of `turns` messages each, one feedback on each conversation's second message."""
    return {
        "conversations": [conversation(c) for c in range(conversations)],
        "messages": [message(c * turns + m, c) for c in range(conversations) for m in range(turns)],
        "feedback": [judgement(c, c * turns + 1, c) for c in range(conversations)],
    }


def write(folder: Path, tables: dict[str, list[Row]], suffix: str = ".parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        if table in tables:
            write_table(folder / f"{table}{suffix}", table, tables[table])
    return folder


def write_table(path: Path, table: str, rows: list[Row]) -> None:
    names = [name for name, column in SOURCE[table].items() if column.required]
    names += sorted({name for row in rows for name in row} - set(names))
    if path.suffix == ".parquet":
        types = {name: TYPES[SOURCE[table][name].kind] if name in SOURCE[table] else pl.String for name in names}
        pl.DataFrame([{name: row.get(name) for name in names} for row in rows], schema=types, orient="row").write_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in rows:
                writer.writerow([_text(row.get(name)) for name in names])
    else:
        lines = (json.dumps({name: _json(row.get(name)) for name in names}, ensure_ascii=True) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _json(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _text(value: Any) -> Any:
    return "" if value is None else _json(value)


def everything_under(home: Path) -> dict[str, str]:
    """The text of every made file: Parquet as JSON, the rest as it is."""
    texts: dict[str, str] = {}
    for path in sorted(p for p in home.rglob("*") if p.is_file()):
        name = str(path.relative_to(home))
        if path.suffix == ".parquet":
            texts[name] = json.dumps(pl.read_parquet(path).to_dicts(), ensure_ascii=False, default=str)
        else:
            texts[name] = path.read_text(encoding="utf-8")
    return texts


def made(home: Path) -> dict[str, str]:
    """`everything_under` without the index of the source, which differs with the files of the source."""
    return {name: text for name, text in everything_under(home).items() if not name.startswith("corpus/index/")}
