"""What the router saw in a week, against the training set and the week before: health, drift, digest.

Drift is a distance with a bound for each measure. Words: share of the users' words that the training set does not hold,
beyond the share that its own validation set has of them. Lengths: Kolmogorov-Smirnov distance of the characters of messages; with
fewer than `LEAST` messages nothing is said. Negative feedback: the week against the four weeks before.
"""

from __future__ import annotations

import bisect
import datetime
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune_assets.assistants import Assistant
from finetune_assets.registry import Ledger
from finetune_assets.registry.tables import now
from finetune_assets.registry.traffic import messages, requests
from finetune_assets.serving.guards import errors
from finetune_assets.serving.observed import BAD, exposed, totals
from finetune_assets.storage import Store

LEAST = 100
"""Messages of users, below which drift is not measured."""
MOST = 5_000
LIMITS = {"unknown_words": 0.05, "lengths": 0.25, "negative_feedback": 0.1}
"""Distance from which users have drifted: shares of words and feedback, distance of distributions."""
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class Drift:
    """One measure: the live week's value, the training set's, their distance; null where there is too little to say."""

    measure: str
    live: float | None
    training: float | None
    distance: float | None

    @property
    def drifted(self) -> bool:
        """Beyond the bound."""
        return self.distance is not None and self.distance > LIMITS[self.measure]

    def row(self) -> dict[str, Any]:
        """For a table."""
        return {**vars(self), "limit": LIMITS[self.measure], "drifted": str(self.drifted).lower()}


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
        text = "; ".join(
            f"{one.measure.replace('_', ' ')} {one.distance:.3f} (limit {LIMITS[one.measure]:g})" for one in measured
        )
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
    newest = sa.select(requests.c.outcome).where(where & (requests.c.outcome != "gone")).order_by(requests.c.created_at.desc())
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
    return Health(
        numbers=seen,
        versions=versions,
        drift=(*_of_texts(texts, store.datasets(assistant.name) / "latest"), _of_feedback(seen, before)),
        few_errors=judged.outcome != "failed",
        errors_text=judged.text,
    )


def _of_texts(texts: Sequence[str], dataset: Path) -> tuple[Drift, Drift]:
    nothing = (Drift("unknown_words", None, None, None), Drift("lengths", None, None, None))
    if len(texts) < LEAST or not (dataset / "train.jsonl").exists():
        return nothing
    train, held = (list(_asked(dataset / f"{split}.jsonl")) for split in ("train", "validation"))
    if not train:
        return nothing
    vocabulary = {word for text in train for word in words(text)}
    usual = unknown(held, vocabulary) if held else 0.0
    live = unknown(texts, vocabulary)
    lengths = [len(text) for text in texts], [len(text) for text in train]
    return (
        Drift("unknown_words", live, usual, live - usual),
        Drift("lengths", sum(lengths[0]) / len(texts), sum(lengths[1]) / len(train), distance(*lengths)),
    )


def _of_feedback(seen: dict[str, Any], before: dict[str, Any]) -> Drift:
    enough = min(seen["feedback"], before["feedback"]) >= LEAST
    live, usual = seen["negative"], before["negative"]
    return Drift("negative_feedback", live, usual, live - usual if enough else None)


def _asked(file: Path) -> Iterable[str]:
    """The last message of the user in each row."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        said = [m["content"] for m in json.loads(line)["messages"] if m["role"] == "user"]
        yield said[-1]


def words(text: str) -> list[str]:
    """Words of three letters and more, in small letters."""
    return _WORD.findall(text.lower())


def unknown(texts: Iterable[str], vocabulary: set[str]) -> float:
    """Share of the words that are not in the vocabulary; 0 where there is no word."""
    counted = [word in vocabulary for text in texts for word in words(text)]
    return 1 - sum(counted) / len(counted) if counted else 0.0


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Kolmogorov-Smirnov: the largest difference of the two distributions, 0..1."""
    a, b = sorted(first), sorted(second)
    return max(abs(bisect.bisect_right(a, x) / len(a) - bisect.bisect_right(b, x) / len(b)) for x in {*a, *b})


# the week's page


def digest(ledger: Ledger, assistants: Sequence[Assistant]) -> tuple[str, list[dict[str, Any]]]:
    """Markdown of the last seven days of all assistants beside the seven before, and the numbers as rows."""
    until = now() + datetime.timedelta(minutes=1)
    since = until - datetime.timedelta(days=7)
    lines = [f"# Week to {until:%Y-%m-%d}", ""]
    rows: list[dict[str, Any]] = []
    for assistant in assistants:
        name, state = assistant.name, ledger.rollout(assistant.name)
        week = totals(ledger, name, since, until)
        before = totals(ledger, name, since - datetime.timedelta(days=7), since)
        met = exposed(ledger, name, state.salt) if state.salt else 0
        newest = next(iter(ledger.versions(name)), None)
        live = state.champion or "the base model"
        lines += [
            f"## {name}",
            "",
            f"- Live: {live}" + (f"; {state.candidate} at {state.step}, {met} people met it" if state.is_open else ""),
        ]
        if newest is not None:
            lines.append(f"- Newest version: {newest.version}, verdict {(newest.verdict or 'none').replace('_', ' ')}")
        lines += [f"- {text}" for text in _compared(week, before)]
        moves = [event for event in ledger.events(name) if event["created_at"] >= since and event["event"] != "verdict"]
        lines += [
            f"- {event['event'].replace('_', ' ')}: {event['version'] or ''} — {event['reason']} ({event['actor']})"
            for event in moves
        ]
        lines.append("")
        rows.append(
            {"assistant": name, "live": live, **{key: week[key] for key in ("requests", "users", "failed", "usd", "negative")}}
        )
    return "\n".join(lines), rows


def _compared(week: dict[str, Any], before: dict[str, Any]) -> list[str]:
    change = week["requests"] - before["requests"]
    texts = [f"Requests: {week['requests']} of {week['users']} people ({change:+d}); {week['failed']} failed"]
    if week["negative"] is not None:
        was = f", before {before['negative']:.1%}" if before["negative"] is not None else ""
        texts.append(f"Negative feedback: {week['negative']:.1%} of {week['feedback']}{was}")
    if week["seconds"] is not None:
        texts.append(f"Mean reply: {week['seconds']:.2f} s")
    usd = "not known (set `budget.usd_per_hour`)" if week["usd"] is None else f"$ {week['usd']:.2f}"
    texts.append(f"Cost: {usd}")
    return texts
