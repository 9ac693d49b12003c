"""What the router saw of an assistant in a week: numbers, errors, and how far its users have drifted from the training set."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune_assets.assistants import Assistant
from finetune_assets.registry import Ledger
from finetune_assets.registry.tables import now
from finetune_assets.registry.traffic import messages, requests
from finetune_assets.serving.drift import LEAST, Drift, of_feedback, of_texts
from finetune_assets.serving.guards import errors
from finetune_assets.serving.observed import BAD, NOBODYS, slowest, totals
from finetune_assets.storage import Store

MOST = 5_000
"""Newest requests and messages that are looked at."""


@dataclass(frozen=True)
class Health:
    """A week of one assistant."""

    numbers: dict[str, float | int | None]
    versions: dict[str, int]
    drift: tuple[Drift, ...]
    few_errors: bool
    errors_text: str

    @property
    def drift_rows(self) -> list[dict[str, Any]]:
        """The measures of drift as rows."""
        return [one.row() for one in self.drift]

    @property
    def drifted(self) -> list[str]:
        """Measures beyond their bound."""
        return [one.measure for one in self.drift if one.drifted]

    def as_dict(self) -> dict[str, Any]:
        """For `<home>/serving/health/<assistant>.json`."""
        measured = [one for one in self.drift if one.distance is not None]
        text = "; ".join(one.text for one in measured)
        return {
            "numbers": self.numbers,
            "versions": self.versions,
            "drift": self.drift_rows,
            "drifted": self.drifted,
            "drift_text": text or f"fewer than {LEAST} messages of users: drift is not measured",
            "few_errors": self.few_errors,
            "errors_text": self.errors_text,
        }


def health_file(store: Store, assistant: str) -> Path:
    """Where the newest `Health` of an assistant is, as JSON."""
    return store.home / "serving" / "health" / f"{assistant}.json"


def health(ledger: Ledger, store: Store, assistant: Assistant) -> Health:
    """The last seven days of an assistant."""
    until = now() + datetime.timedelta(minutes=1)
    since = until - datetime.timedelta(days=7)
    seen = totals(ledger, assistant.name, since, until)
    before = totals(ledger, assistant.name, since - datetime.timedelta(days=28), since)
    where = (requests.c.assistant == assistant.name) & (requests.c.kind == "live") & (requests.c.created_at >= since)
    newest = sa.select(requests.c.outcome).where(where, requests.c.outcome.not_in(NOBODYS)).order_by(requests.c.created_at.desc())
    with ledger.engine.connect() as connection:
        bad = [outcome in BAD for outcome in connection.execute(newest.limit(MOST)).scalars()][::-1]
        conversations = sa.select(requests.c.conversation_id).where(where)
        asked = (
            sa.select(messages.c.content)
            .where((messages.c.role == "user") & messages.c.conversation_id.in_(conversations))
            .order_by(messages.c.created_at.desc())
        )
        texts = [text for text in connection.execute(asked.limit(MOST)).scalars() if text]
    judged = errors(bad, bad, assistant.rollout.usual_errors, assistant.rollout.max_errors)
    versions = seen.pop("versions")
    seen["slowest_seconds"] = slowest(ledger, assistant.name, since, until)
    return Health(
        numbers=seen,
        versions=versions,
        drift=(*of_texts(texts, store.datasets(assistant.name) / "latest"), of_feedback(seen, before)),
        few_errors=judged.outcome != "failed",
        errors_text=judged.text,
    )
