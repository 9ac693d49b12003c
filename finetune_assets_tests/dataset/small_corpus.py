"""A small corpus made row by row: what a test says about an example, and defaults for the rest."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.assistants import Assistant
from finetune_assets.corpus.schema import EXAMPLES, FEEDBACK
from finetune_assets.storage import Store, write_json, write_parquet

UTC = datetime.UTC
START = datetime.datetime(2026, 8, 3, 9, 0, tzinfo=UTC)  # a Monday
TEXT = """agenda limpieza muela caries corona puente consulta dolor encía blanqueo horario sábado martes precio seguro turno
ficha doctora espera radiografía control niño adulto urgencia sillón anestesia retiro placa fluor sellante"""
WORDS = TEXT.split()


def sentence(number: int, salt: str, words: int = 9) -> str:
    """A sentence of its own for each number: no two of them are near-duplicates."""
    digest = hashlib.blake2b(f"{salt}{number}".encode(), digest_size=words * 2).digest()
    return " ".join(WORDS[digest[2 * i] % len(WORDS)] + str(digest[2 * i + 1]) for i in range(words))


def bucket(user: str) -> int:
    return int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest(), "big") % 10_000


class Corpus:
    """Rows of examples and feedback, and the store they are written to."""

    def __init__(self, home: Path) -> None:
        self.store = Store(home)
        self.examples: list[dict[str, Any]] = []
        self.feedback: list[dict[str, Any]] = []

    def example(self, number: int, **given: Any) -> str:
        user = given.get("user", f"u_{number // 3}")
        said = given.get("user_text", f"¿{sentence(number, 'user')}?")
        reply = given.get("reply", f"Claro, {sentence(number, 'reply')}.")
        started = given.get("started_at", START + datetime.timedelta(hours=number))
        row = {
            "message_id": f"msg_{number:05d}",
            "conversation_id": f"conv_{number // 2:05d}" if user is not None else f"conv_n{number:05d}",
            "tenant_id": "clinic_a",
            "vertical": "dental",
            "channel": "web",
            "user": user,
            "bucket": bucket(user or f"conv_n{number}"),
            "training_consent": True,
            "kind": "conversation",
            "intent": ("scheduling", "pricing", "hours")[number % 3],
            "satisfaction_score": 5,
            "started_at": started,
            "created_at": started + datetime.timedelta(minutes=5),
            "context": [{"role": "user", "content": said}],
            "user_text": said,
            "reply": reply,
            "user_chars": len(said),
            "reply_chars": len(reply),
            "error_reply": False,
            "text_key": 0,
        } | given
        if "conversation_id" not in given and user is not None:
            row["conversation_id"] = f"conv_{user}_{number}"
        self.examples.append(row)
        return row["message_id"]

    def rate(self, message_id: str, kind: str = "positive", expected: str | None = None, **given: Any) -> str:
        number = len(self.feedback)
        owner = next((row for row in self.examples if row["message_id"] == message_id), {})
        row = {
            "feedback_id": f"fb_{number:04d}",
            "tenant_id": owner.get("tenant_id", "clinic_a"),
            "conversation_id": owner.get("conversation_id", "conv"),
            "message_id": message_id,
            "feedback_type": kind,
            "rating": None,
            "expected_response": expected,
            "comment": None,
            "created_at": START + datetime.timedelta(days=40, minutes=number),
        } | given
        self.feedback.append(row)
        return row["feedback_id"]

    def fill(self, count: int = 120, first: int = 1000, **given: Any) -> list[str]:
        """Plain good examples, so that there are enough."""
        return [self.example(first + n, **given) for n in range(count)]

    def write(self) -> Store:
        self._weeks("examples", pl.DataFrame(self.examples, schema=EXAMPLES), "started_at")
        self._weeks("feedback", pl.DataFrame(self.feedback, schema=FEEDBACK), "created_at")
        write_json(self.store.tenants, {row["tenant_id"]: row["vertical"] for row in self.examples})
        return self.store

    def _weeks(self, table: str, frame: pl.DataFrame, time: str) -> None:
        dated = frame.with_columns(week=pl.col(time).dt.truncate("1w").dt.strftime("%Y-%m-%d"))
        for (week,), part in dated.group_by("week", maintain_order=True):
            write_parquet(self.store.corpus(table, str(week)) / "part.parquet", part.drop("week"))


def dental(**given: Any) -> Assistant:
    return Assistant(**({"name": "dental", "select": {"vertical": "dental"}, "system_prompt": "Eres amable."} | given))
