"""The ledger's tables and the records read from them.

`ai_finetuning_datasets`, `ai_finetuning_jobs` and `ai_finetuning_runs` have the columns of the users' platform first, our
own after them. Times are UTC and naive in the database, aware in the records.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa

from finetune_assets.registry.rollouts import IDLE, Rollout

metadata = sa.MetaData()

datasets = sa.Table(
    "ai_finetuning_datasets",
    metadata,
    sa.Column("id", sa.String(80), primary_key=True),
    sa.Column("tenant_id", sa.String(80)),
    sa.Column("name", sa.String(160), nullable=False),
    sa.Column("train_file_path", sa.Text, nullable=False),
    sa.Column("validation_file_path", sa.Text),
    sa.Column("stats", sa.JSON),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Column("assistant", sa.String(80), nullable=False),
    sa.Column("fingerprint", sa.String(80), nullable=False),
)

jobs = sa.Table(
    "ai_finetuning_jobs",
    metadata,
    sa.Column("id", sa.String(80), primary_key=True),
    sa.Column("tenant_id", sa.String(80)),
    sa.Column("dataset_id", sa.String(80), nullable=False),
    sa.Column("openai_job_id", sa.String(160)),  # the provider's id, whoever the provider is
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("fine_tuned_model", sa.Text),
    sa.Column("training_file_id", sa.String(160)),
    sa.Column("validation_file_id", sa.String(160)),
    sa.Column("hyperparameters", sa.JSON),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("trained_tokens", sa.BigInteger),
    sa.Column("error", sa.Text),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Column("completed_at", sa.DateTime),
    sa.Column("assistant", sa.String(80), nullable=False),
    sa.Column("provider", sa.String(40), nullable=False),
    sa.Column("dataset_fingerprint", sa.String(80), nullable=False),
    sa.Column("spec_hash", sa.String(80), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("plan", sa.JSON),
    sa.Column("released_by", sa.String(120)),  # who claimed phase two
    sa.Column("release_attempt", sa.Integer, nullable=False, default=0),
    sa.Column("released_at", sa.DateTime),  # when phase two ended
    sa.UniqueConstraint("spec_hash", "attempt"),
)

runs = sa.Table(
    "ai_finetuning_runs",
    metadata,
    sa.Column("id", sa.String(80), primary_key=True),
    sa.Column("tenant_id", sa.String(80)),
    sa.Column("name", sa.String(160), nullable=False),
    sa.Column("description", sa.Text),
    sa.Column("config", sa.JSON),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("dataset_id", sa.String(80)),
    sa.Column("job_id", sa.String(80)),
    sa.Column("fine_tuned_model", sa.Text),
    sa.Column("stats", sa.JSON),
    sa.Column("error", sa.Text),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Column("completed_at", sa.DateTime),
)

versions = sa.Table(
    "model_versions",
    metadata,
    sa.Column("assistant", sa.String(80), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("version", sa.String(80), nullable=False),  # v<number>-<first eight of the content hash>
    sa.Column("content_hash", sa.String(80), nullable=False),
    sa.Column("job_id", sa.String(80), nullable=False),
    sa.Column("dataset_fingerprint", sa.String(80), nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Column("verdict", sa.String(20)),
    sa.Column("reasons", sa.JSON),
    sa.Column("report", sa.Text),
    sa.Column("registered_at", sa.DateTime),
    sa.UniqueConstraint("assistant", "version"),
    sa.UniqueConstraint("assistant", "content_hash"),
)

rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column("assistant", sa.String(80), primary_key=True),
    sa.Column("champion", sa.String(80)),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("updated_at", sa.DateTime, nullable=False),
    sa.Column("candidate", sa.String(80)),
    sa.Column("step", sa.String(10)),
    sa.Column("status", sa.String(20)),
    sa.Column("share", sa.Float),
    sa.Column("salt", sa.String(200)),
    sa.Column("previous", sa.String(80)),
    sa.Column("held_by", sa.String(20)),
    sa.Column("experiment", sa.JSON),  # two versions side by side for chosen tenants or users
)

rollout_events = sa.Table(
    "rollout_events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("assistant", sa.String(80), nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("event", sa.String(40), nullable=False),
    sa.Column("version", sa.String(80)),
    sa.Column("previous", sa.String(80)),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("actor", sa.String(120), nullable=False),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Column("step", sa.String(10)),
    sa.Column("evidence", sa.JSON),  # what the guards said
)

JOB_STATUSES = ("pending", "running", "succeeded", "failed", "cancelled")
OPEN_STATUSES = ("pending", "running")


@dataclass(frozen=True)
class Job:
    """One training job, local or remote."""

    id: str
    assistant: str
    tenant_id: str | None
    provider: str
    provider_job_id: str | None
    base_model: str
    dataset_id: str
    dataset_fingerprint: str
    spec_hash: str
    attempt: int
    status: str
    hyperparameters: dict[str, Any]
    plan: dict[str, Any]
    fine_tuned_model: str | None
    trained_tokens: int | None
    error: str | None
    created_at: datetime.datetime
    completed_at: datetime.datetime | None
    released_by: str | None
    release_attempt: int
    released_at: datetime.datetime | None

    @classmethod
    def of(cls, row: sa.RowMapping) -> Job:
        """The record of a row of `ai_finetuning_jobs`."""
        values = _plain(row)
        values["provider_job_id"] = values.pop("openai_job_id")
        for gone in ("training_file_id", "validation_file_id"):
            values.pop(gone)
        values["hyperparameters"] = values["hyperparameters"] or {}
        values["plan"] = values["plan"] or {}
        return cls(**values)

    @property
    def seconds(self) -> float | None:
        """Wall time from creation to completion."""
        return (self.completed_at - self.created_at).total_seconds() if self.completed_at else None


@dataclass(frozen=True)
class Version:
    """One immutable model version; `verdict` is null until it is registered."""

    assistant: str
    number: int
    version: str
    content_hash: str
    job_id: str
    dataset_fingerprint: str
    base_model: str
    path: str
    created_at: datetime.datetime
    verdict: str | None
    reasons: list[str] | None
    report: str | None
    registered_at: datetime.datetime | None

    @classmethod
    def of(cls, row: sa.RowMapping) -> Version:
        """The record of a row of `model_versions`."""
        return cls(**_plain(row))


def rollout_of(row: sa.RowMapping) -> Rollout:
    """The record of a row of `rollouts`; one that an older program wrote is idle."""
    values = _plain(row)
    values.pop("experiment", None)
    for name, idle in (("step", IDLE), ("status", "idle"), ("share", 0.0)):
        values[name] = values[name] or idle
    return Rollout(**values)


def _plain(row: sa.RowMapping) -> dict[str, Any]:
    return {str(key): _aware(value) for key, value in row.items()}


def _aware(value: object) -> Any:
    return value.replace(tzinfo=datetime.UTC) if isinstance(value, datetime.datetime) else cast("Any", value)


def now() -> datetime.datetime:
    """UTC, naive, as the tables store it."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
