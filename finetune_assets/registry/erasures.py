"""Requests to be forgotten in the ledger: who (as a keyed hash), whether it is done, and what was trained on their rows.

A model version or job holds the rows of an erased person if its data set was rewritten: `erased_datasets` names those. An
assistant is due for a retrain until a job on another data set was opened after the erasure.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from finetune_assets.errors import LedgerError
from finetune_assets.registry.ledger import Ledger
from finetune_assets.registry.tables import Job, Version, erased_datasets, erasures, metadata, now, rollout_events
from finetune_assets.registry.traffic import conversations, feedback, messages, requests, shadow_replies

_KEPT = {"erasures", "erased_datasets"}


@dataclass(frozen=True)
class Erasure:
    """One request; `completed_at` is null as long as something may be left."""

    subject: str
    requested_at: datetime.datetime
    completed_at: datetime.datetime | None
    removed: dict[str, int]
    messages: frozenset[str]
    origin: str | None = None

    @property
    def waits(self) -> bool:
        """Asked for in the source, and nothing was removed yet."""
        return self.origin is not None and self.completed_at is None and not self.removed


@dataclass(frozen=True)
class Rewritten:
    """A data set that held rows of an erased person, and the one that took its place."""

    assistant: str
    fingerprint: str
    rewritten_as: str | None
    rows: int
    erased_at: datetime.datetime


def request(ledger: Ledger, subject: str, key_check: str, removed: dict[str, int], messages: Iterable[str]) -> None:
    """Records a request before anything is removed, with what is about to be. One that was done before is opened again, since new
    rows may have come in; one that was begun keeps its numbers."""
    known = find(ledger, subject)
    values: dict[str, Any] = {"completed_at": None, "messages": sorted({*messages, *(known.messages if known else ())})}
    with ledger.engine.begin() as connection:
        if known is None:
            row = {"subject": subject, "key_check": key_check, "requested_at": now(), "removed": removed}
            connection.execute(sa.insert(erasures).values(row | values))
            return
        if known.waits:
            values["removed"] = removed
        elif known.completed_at:
            values["removed"] = {name: known.removed.get(name, 0) + removed.get(name, 0) for name in {*known.removed, *removed}}
        connection.execute(sa.update(erasures).where(erasures.c.subject == subject).values(values))


def record_asked(ledger: Ledger, asked: Iterable[str], key_check: str) -> None:
    """Records subjects that a source asks to forget, those that are not known yet: builds leave them out from now on."""
    for subject in sorted(asked):
        if find(ledger, subject) is None:
            row = {"subject": subject, "key_check": key_check, "requested_at": now(), "origin": "source"}
            try:
                with ledger.engine.begin() as connection:
                    connection.execute(sa.insert(erasures).values(row))
            except IntegrityError:
                pass  # another run read the same request at once


def complete(ledger: Ledger, subject: str) -> None:
    """Marks a request as done."""
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(erasures).where(erasures.c.subject == subject).values(completed_at=now()))


def find(ledger: Ledger, subject: str) -> Erasure | None:
    """The request of a subject, or None."""
    return next(iter(_read(ledger, erasures.c.subject == subject)), None)


def all_erasures(ledger: Ledger) -> list[Erasure]:
    """Every request, oldest first."""
    return _read(ledger, sa.true())


def _read(ledger: Ledger, where: sa.ColumnElement[bool]) -> list[Erasure]:
    query = sa.select(erasures).where(where).order_by(erasures.c.requested_at, erasures.c.subject)
    with ledger.engine.connect() as connection:
        rows = connection.execute(query).mappings().all()
    return [
        Erasure(
            row["subject"],
            row["requested_at"].replace(tzinfo=datetime.UTC),
            row["completed_at"].replace(tzinfo=datetime.UTC) if row["completed_at"] else None,
            row["removed"] or {},
            frozenset(row["messages"] or ()),
            row["origin"],
        )
        for row in rows
    ]


def subjects(ledger: Ledger, key_check: str) -> frozenset[str]:
    """Whom to leave out of every build. Raises LedgerError where they were hashed with another key: none would be found."""
    with ledger.engine.connect() as connection:
        rows = connection.execute(sa.select(erasures.c.subject, erasures.c.key_check)).all()
    other = sum(check != key_check for _, check in rows)
    if other:
        raise LedgerError(
            f"{other} of {len(rows)} erasures were recorded with another user key: those people would come back unseen. "
            "Set FINETUNE_USER_KEY (or <home>/key) to the key of that time."
        )
    return frozenset(subject for subject, _ in rows)


def mark_dataset(ledger: Ledger, assistant: str, fingerprint: str, rewritten_as: str | None, rows: int) -> None:
    """Records that a data set was rewritten, and an event for each version that was trained on it; once."""
    row = {"assistant": assistant, "fingerprint": fingerprint, "rewritten_as": rewritten_as, "rows": rows, "erased_at": now()}
    trained = [version for version in ledger.versions(assistant) if version.dataset_fingerprint == fingerprint]
    events = [_event(ledger, version) for version in trained]
    try:
        with ledger.engine.begin() as connection:
            connection.execute(sa.insert(erased_datasets).values(row))
            for event in events:
                connection.execute(sa.insert(rollout_events).values(event))
    except IntegrityError:
        pass  # marked by an earlier run


def _event(ledger: Ledger, version: Version) -> dict[str, Any]:
    rollout = ledger.rollout(version.assistant)
    role = "The champion" if rollout.champion == version.version else "This version"
    return {
        "assistant": version.assistant,
        "generation": rollout.generation,
        "event": "erasure",
        "version": version.version,
        "previous": None,
        "reason": f"{role} was trained on {version.dataset_fingerprint}, which held an erased person's rows; a retrain is due",
        "actor": "finetune erase",
        "created_at": now(),
    }


def rewritten(ledger: Ledger, assistant: str | None = None) -> list[Rewritten]:
    """Data sets that were rewritten, oldest first."""
    where = erased_datasets.c.assistant == assistant if assistant else sa.true()
    query = sa.select(erased_datasets).where(where).order_by(erased_datasets.c.erased_at, erased_datasets.c.fingerprint)
    with ledger.engine.connect() as connection:
        rows = connection.execute(query).mappings().all()
    return [Rewritten(**{**row, "erased_at": row["erased_at"].replace(tzinfo=datetime.UTC)}) for row in rows]


def marked_versions(ledger: Ledger, assistant: str | None = None) -> list[Version]:
    """Versions that were trained on rows of people who were erased since, newest first."""
    found = [(row.assistant, row.fingerprint) for row in rewritten(ledger, assistant)]
    return [version for version in ledger.versions(assistant) if (version.assistant, version.dataset_fingerprint) in found]


def retrain_due(ledger: Ledger, assistant: str) -> str | None:
    """The newest data set of an assistant whose jobs hold erased rows, if nothing was trained since; null: no retrain is due."""
    gone = {row.fingerprint: row for row in rewritten(ledger, assistant)}
    jobs: list[Job] = [job for job in ledger.jobs(assistant) if job.status not in ("failed", "cancelled")]
    if not jobs or jobs[0].dataset_fingerprint not in gone:
        return None
    return jobs[0].dataset_fingerprint


def own_rows(ledger: Ledger, wanted: Mapping[str, Collection[str]], *, delete: bool) -> dict[str, int]:
    """Rows of the ledger's own tables (requests, ratings, …) that hold one of the values in a column of that name; counted by
    table, and deleted if asked for, all at once. `wanted`: column -> values."""
    found: dict[str, int] = {}
    with ledger.engine.begin() as connection:
        _overwriting(connection)
        for table, where in _holding(wanted):
            count = int(connection.execute(sa.select(sa.func.count()).select_from(table).where(where)).scalar_one())
            if count:
                found[table.name] = count
                if delete:
                    connection.execute(sa.delete(table).where(where))
    return found


def take_ownerless(ledger: Ledger) -> None:
    """Removes what erasures left before they knew the router's chats: its messages, judgements and shadow replies without a
    conversation and a request."""
    asked = sa.exists().where(requests.c.conversation_id == messages.c.conversation_id)
    kept = sa.exists().where(conversations.c.conversation_id == messages.c.conversation_id)
    own = messages.c.message_id.like("m-chatcmpl-%") | messages.c.message_id.like("t%-chatcmpl-%")
    judged = sa.exists().where(requests.c.message_id == feedback.c.message_id)
    shadowed = sa.exists().where(requests.c.request_id == shadow_replies.c.request_id)
    with ledger.engine.begin() as connection:
        _overwriting(connection)
        connection.execute(sa.delete(messages).where(own & ~asked & ~kept))
        connection.execute(sa.delete(feedback).where(feedback.c.message_id.like("m-chatcmpl-%") & ~judged))
        connection.execute(sa.delete(shadow_replies).where(~shadowed))


def _overwriting(connection: sa.Connection) -> None:
    """What is deleted is overwritten, not only forgotten."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA secure_delete=ON")


def distinct_values(ledger: Ledger, column: str, wanted: Mapping[str, Collection[str]] | None = None) -> set[str]:
    """What stands in a column of that name in any of the ledger's own tables; `wanted`: of rows as `own_rows` takes them."""
    values: set[str] = set()
    tables = [(table, sa.true()) for table in _own_tables()] if wanted is None else _holding(wanted)
    with ledger.engine.connect() as connection:
        for table, where in tables:
            if column in table.c and isinstance(table.c[column].type, sa.String):
                values |= {row[0] for row in connection.execute(sa.select(table.c[column]).where(where).distinct()) if row[0]}
    return values


def _own_tables() -> list[sa.Table]:
    return [table for table in metadata.sorted_tables if table.name not in _KEPT]


def _holding(wanted: Mapping[str, Collection[str]]) -> Iterator[tuple[sa.Table, sa.ColumnElement[bool]]]:
    """Tables with columns of these names, and which of their rows are meant."""
    for table in _own_tables():
        hits = [table.c[name].in_(list(values)) for name, values in wanted.items() if name in table.c and values]
        if hits:
            yield table, sa.or_(*hits)


def summary(erasure: Erasure) -> dict[str, Any]:
    """A request as JSON."""
    return {
        "subject": erasure.subject,
        "requested_at": erasure.requested_at.isoformat(timespec="seconds"),
        "completed_at": erasure.completed_at.isoformat(timespec="seconds") if erasure.completed_at else None,
        "removed": erasure.removed,
        "origin": erasure.origin,
        "waits": erasure.waits,
    }
