"""Numbers the rows and writes the sample: three Parquet tables in the platform's schema, and the truth of what was planted."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from . import dental, plant, restaurant, sample
from .sample import Conversation

Row = dict[str, Any]
TIME = pa.timestamp("us", tz="UTC")
SCHEMAS = {
    "conversations": pa.schema(
        [
            ("conversation_id", pa.string()),
            ("tenant_id", pa.string()),
            ("user_id", pa.string()),
            ("vertical", pa.string()),
            ("channel", pa.string()),
            ("satisfaction_score", pa.int8()),
            ("started_at", TIME),
            ("ended_at", TIME),
        ]
    ),
    "messages": pa.schema(
        [
            ("message_id", pa.string()),
            ("conversation_id", pa.string()),
            ("role", pa.string()),
            ("content", pa.string()),
            ("intent", pa.string()),
            ("created_at", TIME),
        ]
    ),
    "feedback": pa.schema(
        [
            ("feedback_id", pa.string()),
            ("tenant_id", pa.string()),
            ("conversation_id", pa.string()),
            ("message_id", pa.string()),
            ("feedback_type", pa.string()),
            ("rating", pa.int8()),
            ("expected_response", pa.string()),
            ("comment", pa.string()),
            ("created_at", TIME),
        ]
    ),
}


def write_sample(out: Path, seed: int, count: int = 1_900, exact: int = 50, near: int = 60) -> dict[str, int]:
    """Make the sample and write it to `out`; returns the number of rows of each table."""
    rng = random.Random(f"{seed}/plant")
    made = sample.conversations(count, seed)
    plant.bad_replies(rng, made, corrected=0.05, negative=0.015)
    same, like = plant.copies(rng, made, exact, near)
    everyone = sorted(made + [copy for _, copy in same + like], key=lambda one: (one.started_at, one.user_id))
    tables, ids = _tables(everyone)
    tables["feedback"], truth = plant.feedback(rng, everyone, ids, positive=0.3)
    for number, row in enumerate(tables["feedback"], 1):
        row["feedback_id"] = f"fb_{number:06d}"
    bad = plant.broken_rows(rng, tables)
    found = {
        "exact_duplicates": [[a.conversation_id, b.conversation_id] for a, b in same],
        "near_duplicates": [[a.conversation_id, b.conversation_id] for a, b in like],
        "pii": [entry for one in everyone for entry in _pii(one, ids[id(one)])],
        **truth,
        "bad_rows": bad,
        "own_contacts": {tenant.tenant_id: [tenant.phone, tenant.email] for tenant in dental.TENANTS + restaurant.TENANTS},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        rng.shuffle(rows)
        pq.write_table(
            pa.Table.from_pylist(rows, schema=SCHEMAS[name]), out / f"{name}.parquet", compression="zstd", compression_level=12
        )
    (out / "truth.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return {name: len(rows) for name, rows in tables.items()}


def _tables(everyone: list[Conversation]) -> tuple[dict[str, list[Row]], dict[int, list[str]]]:
    """Rows of conversations and messages, and the message ids of each conversation."""
    tables: dict[str, list[Row]] = {"conversations": [], "messages": []}
    ids: dict[int, list[str]] = {}
    for number, one in enumerate(everyone, 1):
        one.conversation_id = f"conv_{number:06d}"
        tables["conversations"].append(
            {
                "conversation_id": one.conversation_id,
                "tenant_id": one.tenant.tenant_id,
                "user_id": one.user_id,
                "vertical": one.tenant.vertical,
                "channel": one.channel,
                "satisfaction_score": one.score,
                "started_at": one.started_at,
                "ended_at": one.times[-1],
            }
        )
        ids[id(one)] = []
        for turn, at in zip(one.turns, one.times, strict=True):
            message_id = f"msg_{len(tables['messages']) + 1:06d}"
            ids[id(one)].append(message_id)
            tables["messages"].append(
                {
                    "message_id": message_id,
                    "conversation_id": one.conversation_id,
                    "role": turn.role,
                    "content": turn.text,
                    "intent": turn.intent,
                    "created_at": at,
                }
            )
    return tables, ids


def _pii(one: Conversation, message_ids: list[str]) -> list[Row]:
    """What was planted in this conversation, and every message in which an introduced name stands."""
    found = []
    for turn, message_id in zip(one.turns, message_ids, strict=True):
        found += [{"message_id": message_id, "kind": kind, "value": value} for kind, value in turn.pii]
        for name in one.names:
            for value in dict.fromkeys((name, name.split()[0])):
                if re.search(rf"\b{value}\b", turn.text):
                    found.append({"message_id": message_id, "kind": "name", "value": value})
                    break
    return found
