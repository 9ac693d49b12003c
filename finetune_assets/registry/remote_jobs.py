"""What the ledger remembers of jobs that run elsewhere: each step before the next request, and when to ask again."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from finetune_assets.errors import LedgerError
from finetune_assets.registry.ledger import Ledger
from finetune_assets.registry.tables import OPEN_STATUSES, Job, jobs, now, remote_jobs

SUBMITTED = "provider_job_id"
"""Key of a journal that holds the provider's job id once it is known."""


@dataclass(frozen=True)
class RemoteJob:
    """A ledger job with what is known of it at the provider."""

    job: Job
    connection: dict[str, Any]
    """As it was opened, at the address of its journal."""
    state: dict[str, Any]
    provider_status: str | None
    progress: dict[str, Any]
    note: str | None
    submitted_at: datetime.datetime | None
    deadline: datetime.datetime
    polled_at: datetime.datetime | None
    failures: int


class LedgerJournal:
    """A job's journal in the ledger."""

    def __init__(self, ledger: Ledger, job_id: str) -> None:
        self.ledger, self.job_id = ledger, job_id

    def load(self) -> dict[str, Any]:
        """Everything saved; empty where the job is unknown."""
        query = sa.select(remote_jobs.c.state).where(remote_jobs.c.job_id == self.job_id)
        with self.ledger.engine.connect() as connection:
            return dict(connection.execute(query).scalar() or {})

    def save(self, **values: Any) -> dict[str, Any]:
        """Adds values, and the file and job ids to the platform's own columns; everything saved, in the same instant.

        Raises LedgerError for an unknown job.
        """
        known = {"training_file": "training_file_id", "validation_file": "validation_file_id", SUBMITTED: "openai_job_id"}
        columns = {known[key]: value for key, value in values.items() if key in known}
        with self.ledger.engine.begin() as connection:
            where = remote_jobs.c.job_id == self.job_id
            # A write first: it holds the row, on SQLite too, so that nobody saves between this reading and writing.
            if not connection.execute(sa.update(remote_jobs).where(where).values(job_id=self.job_id)).rowcount:
                raise LedgerError(f"Job {self.job_id} has no journal; materialise training_job again.")
            after = {**(connection.execute(sa.select(remote_jobs.c.state).where(where)).scalar() or {}), **values}
            changes: dict[str, Any] = {"state": after}
            if values.get(SUBMITTED):
                changes |= {"submitted_at": now(), "next_poll_at": now()}
            connection.execute(sa.update(remote_jobs).where(where).values(changes))
            if columns:
                connection.execute(sa.update(jobs).where(jobs.c.id == self.job_id).values(columns))
        return after


def open_journal(ledger: Ledger, job_id: str, connection: Mapping[str, Any], hours: float) -> LedgerJournal:
    """The journal of a job, with a deadline `hours` from now if it is new or was not submitted yet."""
    row = {
        "job_id": job_id,
        "connection": dict(connection),
        "state": {},
        "deadline": now() + datetime.timedelta(hours=hours),
        "next_poll_at": now() + datetime.timedelta(minutes=2),  # whoever submits is at work until then
        "failures": 0,
    }
    try:
        with ledger.engine.begin() as transaction:
            transaction.execute(sa.insert(remote_jobs).values(row))
    except IntegrityError:  # a job that was interrupted has one
        again = {name: row[name] for name in ("deadline", "next_poll_at")}
        open_still = (remote_jobs.c.job_id == job_id) & remote_jobs.c.submitted_at.is_(None)
        with ledger.engine.begin() as transaction:
            transaction.execute(sa.update(remote_jobs).where(open_still).values(again))
    return LedgerJournal(ledger, job_id)


def remote_job(ledger: Ledger, job_id: str) -> RemoteJob | None:
    """One job with its journal; null for one that runs here."""
    return next(iter(_select(ledger, jobs.c.id == job_id)), None)


def open_remote(ledger: Ledger, assistant: str | None = None) -> list[RemoteJob]:
    """Jobs that have not ended, longest unasked first."""
    where = jobs.c.status.in_(OPEN_STATUSES)
    return _select(ledger, where & (jobs.c.assistant == assistant) if assistant else where)


def due(ledger: Ledger, moment: datetime.datetime) -> list[RemoteJob]:
    """Open jobs that may be asked again at `moment` (UTC, naive), longest unasked first."""
    return _select(ledger, jobs.c.status.in_(OPEN_STATUSES) & (remote_jobs.c.next_poll_at <= moment))


def lost_remote(ledger: Ledger, moment: datetime.datetime, since: datetime.datetime) -> list[RemoteJob]:
    """Jobs opened after `since` that failed or were cancelled, and may be asked again at `moment` (both UTC, naive)."""
    lost = jobs.c.status.in_(("failed", "cancelled")) & (jobs.c.created_at >= since)
    return _select(ledger, lost & (remote_jobs.c.next_poll_at <= moment))


def failed_remote(ledger: Ledger, assistant: str, provider: str) -> list[RemoteJob]:
    """Jobs of an assistant at a provider that failed."""
    return _select(ledger, (jobs.c.status == "failed") & (jobs.c.assistant == assistant) & (jobs.c.provider == provider))


def deployed_remote(ledger: Ledger) -> list[RemoteJob]:
    """Jobs whose model was deployed at its provider, and not taken back by us."""
    found = _select(ledger, sa.true())
    return [one for one in found if one.state.get("deployment") and not one.state.get("undeployed")]


def record(ledger: Ledger, job_id: str, next_poll_at: datetime.datetime, **columns: Any) -> None:
    """Writes down what asking gave: provider_status, progress, note, failures, deadline."""
    values = {"polled_at": now(), "next_poll_at": next_poll_at, **columns}
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(remote_jobs).where(remote_jobs.c.job_id == job_id).values(values))


def _select(ledger: Ledger, where: sa.ColumnElement[bool]) -> list[RemoteJob]:
    query = (
        sa.select(remote_jobs)
        .join(jobs, jobs.c.id == remote_jobs.c.job_id)
        .where(where)
        .order_by(remote_jobs.c.next_poll_at, remote_jobs.c.job_id)
    )
    with ledger.engine.connect() as connection:
        rows = list(connection.execute(query).mappings())
    jobs_by_id = {job.id: job for job in ledger.jobs()} if len(rows) > 1 else {}
    return [_of(row, jobs_by_id.get(row["job_id"]) or ledger.job(row["job_id"])) for row in rows]


def _of(row: sa.RowMapping, job: Job) -> RemoteJob:
    def aware(name: str) -> Any:
        value = row[name]
        return value.replace(tzinfo=datetime.UTC) if value is not None else None

    state = row["state"] or {}
    return RemoteJob(
        job=job,
        connection={**row["connection"], **({"address": state["address"]} if state.get("address") else {})},
        state=state,
        provider_status=row["provider_status"],
        progress=row["progress"] or {},
        note=row["note"],
        submitted_at=aware("submitted_at"),
        deadline=aware("deadline"),
        polled_at=aware("polled_at"),
        failures=row["failures"],
    )
