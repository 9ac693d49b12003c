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

erasures = sa.Table(
    "erasures",
    metadata,
    sa.Column("subject", sa.String(40), primary_key=True),  # u_… or p_…: a keyed hash, nothing else of the person
    sa.Column("key_check", sa.String(40), nullable=False),
    sa.Column("requested_at", sa.DateTime, nullable=False),
    sa.Column("completed_at", sa.DateTime),  # null: begun, and to be gone on with
    sa.Column("removed", sa.JSON),  # what -> rows
    sa.Column("messages", sa.JSON),  # keyed hashes of the ids that were removed, by which `explain` knows them again
    sa.Column("origin", sa.String(20)),  # source: asked for there; null: by a person on the command line
)

erased_datasets = sa.Table(
    "erased_datasets",
    metadata,
    sa.Column("assistant", sa.String(80), primary_key=True),
    sa.Column("fingerprint", sa.String(80), primary_key=True),  # what was rewritten: whoever was trained on it holds the rows
    sa.Column("rewritten_as", sa.String(80)),  # null: nothing was left to train on
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("erased_at", sa.DateTime, nullable=False),
)

remote_jobs = sa.Table(
    "remote_jobs",
    metadata,
    sa.Column("job_id", sa.String(80), primary_key=True),
    sa.Column("connection", sa.JSON, nullable=False),  # where the provider is and which variable holds the key; no secret
    sa.Column("state", sa.JSON, nullable=False),  # what was uploaded and asked, each written before the next request
    sa.Column("provider_status", sa.String(80)),
    sa.Column("progress", sa.JSON),
    sa.Column("note", sa.Text),  # the last warning
    sa.Column("submitted_at", sa.DateTime),
    sa.Column("deadline", sa.DateTime, nullable=False),
    sa.Column("polled_at", sa.DateTime),
    sa.Column("next_poll_at", sa.DateTime),
    sa.Column("failures", sa.Integer, nullable=False),
)

spending = sa.Table(
    "spending",
    metadata,
    sa.Column("reference", sa.String(160), primary_key=True),  # a job, or a budgeted piece of work: never counted twice
    sa.Column("assistant", sa.String(80), nullable=False),
    sa.Column("provider", sa.String(40), nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),  # training, replies
    sa.Column("usd", sa.Float),  # null: no price is known
    sa.Column("final", sa.Boolean, nullable=False),  # false: an estimate, reserved before it is spent
    sa.Column("tokens", sa.BigInteger),
    sa.Column("created_at", sa.DateTime, nullable=False),
)

ratings = sa.Table(
    "ratings",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("assistant", sa.String(80), nullable=False),
    sa.Column("study", sa.String(80), nullable=False),
    sa.Column("item", sa.String(40), nullable=False),
    sa.Column("rater", sa.String(80), nullable=False),
    sa.Column("choice", sa.String(40), nullable=False),  # the candidate that won, tie, both_bad; accept, reject
    sa.Column("left", sa.String(40), nullable=False),  # candidate on the left side
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("seconds", sa.Float),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.UniqueConstraint("assistant", "study", "item", "rater"),
)

ledger_schema = sa.Table(
    "ledger_schema",
    metadata,
    sa.Column("fingerprint", sa.String(40), primary_key=True),  # of declared tables that this ledger has been brought up to
    sa.Column("prepared_at", sa.DateTime, nullable=False),
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
