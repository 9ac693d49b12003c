"""The ledger on SQLite or Postgres: what was trained from what, which version is whose, and who serves.

Each method is one transaction. Rows are claimed by compare-and-set updates, so that two processes never do the same work;
`rollout_events` only grows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from finetune_assets.errors import LedgerError
from finetune_assets.registry.rollouts import Rollout, served_anew, taken_back
from finetune_assets.registry.schema import prepare
from finetune_assets.registry.tables import (
    JOB_STATUSES,
    OPEN_STATUSES,
    Job,
    Version,
    datasets,
    jobs,
    now,
    rollout_events,
    rollout_of,
    rollouts,
    runs,
    versions,
)

RUN_STATUS = {"pending": "preparing", "running": "training", "succeeded": "completed", "failed": "failed", "cancelled": "failed"}
"""Status of the platform's run for each status of our job: a cancelled job ends its run."""
LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""Seconds, and at last milliseconds, after which a Postgres that nobody reaches any more is given up, where the URL says nothing
else: else a connection whose server is gone waits for hours."""


class Ledger:
    """Reads and writes the ledger at a database URL; makes the tables on first use."""

    def __init__(self, url: str) -> None:
        self.engine = _connect(url)

    def close(self) -> None:
        """Gives the connections back."""
        self.engine.dispose()

    # data sets and jobs

    def record_dataset(self, assistant: str, tenant: str | None, folder: Path, manifest: dict[str, Any]) -> str:
        """The id of a frozen data set's row, made if it is new."""
        fingerprint = str(manifest["fingerprint"])
        dataset_id = f"ds-{assistant}-{fingerprint[:16]}"
        row = {
            "id": dataset_id,
            "tenant_id": tenant,
            "name": f"{assistant} {fingerprint[:8]}",
            "train_file_path": str(folder / "train.jsonl"),
            "validation_file_path": str(folder / "validation.jsonl"),
            "stats": manifest["counts"],
            "created_at": now(),
            "assistant": assistant,
            "fingerprint": fingerprint,
        }
        try:
            with self.engine.begin() as connection:
                connection.execute(sa.insert(datasets).values(row))
        except IntegrityError:
            pass  # the same content has the same id
        return dataset_id

    def datasets_in_use(self, assistant: str) -> set[str]:
        """Fingerprints of the data sets of the assistant's versions (so of its rollout) and of its jobs that are not over."""
        open_jobs = [
            job
            for job in self.jobs(assistant)
            if job.status in OPEN_STATUSES or (job.status == "succeeded" and job.released_at is None)
        ]
        return {one.dataset_fingerprint for one in (*self.versions(assistant), *open_jobs)}

    def open_job(self, job: dict[str, Any]) -> Job:
        """The job of `job["spec_hash"]`: the newest one that has not failed, else a new attempt.

        `job` holds id-less columns: assistant, tenant_id, dataset_id, dataset_fingerprint, provider, base_model,
        hyperparameters, plan, spec_hash. So a repeated call attaches to what runs or is done, and never starts a second job.
        """
        while True:
            known = self._jobs(jobs.c.spec_hash == job["spec_hash"])
            if known and known[0].status not in ("failed", "cancelled"):
                return known[0]
            attempt = known[0].attempt + 1 if known else 1
            job_id = f"job-{job['spec_hash'][:12]}-{attempt}"
            row = {**job, "id": job_id, "attempt": attempt, "status": "pending", "created_at": now(), "release_attempt": 0}
            run = {
                "id": job_id.replace("job-", "run-", 1),
                "tenant_id": job["tenant_id"],
                "name": f"{job['assistant']} on {job['base_model']}",
                "config": job["hyperparameters"],
                "status": "preparing",
                "dataset_id": job["dataset_id"],
                "job_id": job_id,
                "created_at": now(),
            }
            try:
                with self.engine.begin() as connection:
                    connection.execute(sa.insert(jobs).values(row))
                    connection.execute(sa.insert(runs).values(run))
            except IntegrityError:
                holder = self._jobs(jobs.c.id == job_id)
                if not holder:
                    raise
                if holder[0].spec_hash != job["spec_hash"]:
                    raise LedgerError(
                        f"Job {job_id} is of another spec, {holder[0].spec_hash}, not of {job['spec_hash']}: the first twelve "
                        "characters are the same. Change a setting of the training, for example its seed."
                    ) from None
                continue  # somebody else opened this attempt in between: attach to theirs
            return self.job(job_id)

    def set_job(self, job_id: str, status: str, **columns: Any) -> Job:
        """Sets a job's status and other columns, and the platform's run with it. Raises LedgerError for an unknown one."""
        if status not in JOB_STATUSES:
            raise LedgerError(f"Job {job_id}: status {status!r} is none of {', '.join(JOB_STATUSES)}.")
        values = {"status": status, **columns}
        if status not in OPEN_STATUSES:
            values.setdefault("completed_at", now())
        run = {"status": RUN_STATUS[status], "completed_at": values.get("completed_at"), "error": values.get("error")}
        if "fine_tuned_model" in values:
            run["fine_tuned_model"] = values["fine_tuned_model"]
        with self.engine.begin() as connection:
            if connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values)).rowcount != 1:
                raise LedgerError(f"Job {job_id} is not in the ledger; `finetune jobs list` shows those that are.")
            connection.execute(sa.update(runs).where(runs.c.job_id == job_id).values(run))
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        """One job. Raises LedgerError if there is none."""
        found = self._jobs(jobs.c.id == job_id)
        if not found:
            raise LedgerError(f"Job {job_id} is not in the ledger; `finetune jobs list` shows those that are.")
        return found[0]

    def jobs(self, assistant: str | None = None) -> list[Job]:
        """Jobs, newest first."""
        return self._jobs(jobs.c.assistant == assistant if assistant else sa.true())

    def unreleased(self) -> list[Job]:
        """Succeeded jobs whose phase two has not ended, oldest first."""
        return self._jobs((jobs.c.status == "succeeded") & jobs.c.released_at.is_(None))[::-1]

    def claim_release(self, job_id: str, owner: str, previous: str | None = None) -> bool:
        """Claims phase two of a job for `owner` if it is held by `previous` (null: by nobody). True if it is ours now."""
        held = jobs.c.released_by.is_(None) if previous is None else jobs.c.released_by == previous
        claim = (
            sa.update(jobs)
            .where((jobs.c.id == job_id) & held)
            .values(released_by=owner, release_attempt=jobs.c.release_attempt + 1)
        )
        with self.engine.begin() as connection:
            return connection.execute(claim).rowcount == 1

    def release_done(self, job_id: str) -> None:
        """Marks phase two of a job as ended."""
        with self.engine.begin() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(released_at=now()))

    def _jobs(self, where: sa.ColumnElement[bool]) -> list[Job]:
        query = sa.select(jobs).where(where).order_by(jobs.c.created_at.desc(), jobs.c.attempt.desc())
        with self.engine.connect() as connection:
            return [Job.of(row) for row in connection.execute(query).mappings()]

    # versions

    def mint_version(self, job: Job, content_hash: str, folder: Path) -> Version:
        """The version of a trained model, numbered within its assistant; equal content is the same version.

        `folder` is the parent folder of the assistant's versions. Raises LedgerError after a hundred lost races.
        """
        for _ in range(100):
            known = self._versions((versions.c.assistant == job.assistant) & (versions.c.content_hash == content_hash))
            if known:
                return known[0]
            number = max((version.number for version in self.versions(job.assistant)), default=0) + 1
            name = f"v{number}-{content_hash[:8]}"
            row = {
                "assistant": job.assistant,
                "number": number,
                "version": name,
                "content_hash": content_hash,
                "job_id": job.id,
                "dataset_fingerprint": job.dataset_fingerprint,
                "base_model": job.base_model,
                "path": str(folder / name),
                "created_at": now(),
            }
            try:
                with self.engine.begin() as connection:
                    connection.execute(sa.insert(versions).values(row))
            except IntegrityError:
                continue  # another process took this number
        raise LedgerError(f"No version number of {job.assistant} could be taken; is another process minting in a loop?")

    def register(self, assistant: str, version: str, verdict: str, reasons: list[str], report: str) -> Version:
        """Stores the verdict of exactly this version; a later benchmark of the same version replaces it and is an event."""
        where = (versions.c.assistant == assistant) & (versions.c.version == version)
        values = {"verdict": verdict, "reasons": reasons, "report": report, "registered_at": now()}
        while True:
            before = self.version(assistant, version)
            same = versions.c.verdict.is_not_distinct_from(before.verdict)
            generation = self.rollout(assistant).generation
            why = (f"benchmark says {verdict}", "registered_model")
            with self.engine.begin() as connection:
                if connection.execute(sa.update(versions).where(where & same).values(values)).rowcount != 1:
                    continue  # another benchmark of it was faster: its verdict is the one before
                if before.verdict != verdict:
                    row = _event_row(assistant, generation, "verdict", version, before.verdict, why)
                    connection.execute(sa.insert(rollout_events).values(row))
            return self.version(assistant, version)

    def version(self, assistant: str, version: str) -> Version:
        """One version. Raises LedgerError if there is none."""
        found = self._versions((versions.c.assistant == assistant) & (versions.c.version == version))
        if not found:
            raise LedgerError(f"Version {version} of {assistant} is not in the ledger; `finetune status` shows those that are.")
        return found[0]

    def versions(self, assistant: str | None = None) -> list[Version]:
        """Versions, newest first."""
        return self._versions(versions.c.assistant == assistant if assistant else sa.true())

    def _versions(self, where: sa.ColumnElement[bool]) -> list[Version]:
        query = sa.select(versions).where(where).order_by(versions.c.number.desc())
        with self.engine.connect() as connection:
            return [Version.of(row) for row in connection.execute(query).mappings()]

    # rollouts

    def rollout(self, assistant: str) -> Rollout:
        """An assistant's rollout; generation 0 and no champion before the first one."""
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(rollouts).where(rollouts.c.assistant == assistant)).mappings().first()
        return rollout_of(row) if row else Rollout(assistant, None, 0, None)

    def rollouts(self) -> list[Rollout]:
        """Every assistant's rollout, by name."""
        with self.engine.connect() as connection:
            found = connection.execute(sa.select(rollouts).order_by(rollouts.c.assistant)).mappings()
            return [rollout_of(row) for row in found]

    def move(
        self, before: Rollout, after: Rollout, event: str, why: tuple[str, str], evidence: Any = None, ended: Any = None
    ) -> Rollout:
        """Stores a rollout's next state and its event, if nobody changed it since `before`. `why`: reason and actor.

        A rollback also ends, in the same transaction, an experiment with a version that is taken back; `ended` is its result.
        Raises LedgerError if the generation has moved on, or if a version that gets more users is no longer to be served.
        """
        values = {field: value for field, value in vars(after).items() if field != "assistant"} | {"updated_at": now()}
        moved = f"The rollout of {before.assistant} moved on from generation {before.generation}; read it again and decide anew."
        version = after.candidate or before.candidate or before.champion  # what it is about: without a rollout, what is left
        row = _event_row(before.assistant, after.generation, event, version, before.champion, why)
        row |= {"step": after.step, "evidence": evidence}
        try:
            with self.engine.begin() as connection:
                if before.generation == 0:
                    connection.execute(sa.insert(rollouts).values(assistant=before.assistant, **values))
                else:
                    same = (rollouts.c.assistant == before.assistant) & (rollouts.c.generation == before.generation)
                    if connection.execute(sa.update(rollouts).where(same).values(values)).rowcount != 1:
                        raise LedgerError(moved)
                _need_serve(connection, before.assistant, served_anew(before, after))
                if event == "rolled_back":
                    _end_experiment(connection, before, after, why[1], ended)
                connection.execute(sa.insert(rollout_events).values(row))
        except IntegrityError:
            raise LedgerError(moved) from None
        return self.rollout(before.assistant)

    def events(self, assistant: str) -> list[dict[str, Any]]:
        """What happened to an assistant's versions and rollout, oldest first."""
        query = sa.select(rollout_events).where(rollout_events.c.assistant == assistant).order_by(rollout_events.c.id)
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def events_after(self, number: int, most: int = 200) -> list[dict[str, Any]]:
        """The next events of all assistants after the one with this id, oldest first."""
        query = sa.select(rollout_events).where(rollout_events.c.id > number).order_by(rollout_events.c.id).limit(most)
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]


def _need_serve(connection: sa.Connection, assistant: str, version: str | None) -> None:
    """Within the transaction of a move: a benchmark that changes the verdict comes before all of it, or after."""
    if version is None:
        return
    here = (versions.c.assistant == assistant) & (versions.c.version == version)
    verdict = connection.execute(sa.select(versions.c.verdict).where(here).with_for_update(read=True)).scalar()
    if verdict != "serve":
        raise LedgerError(f"The verdict of {version} ({assistant}) is {verdict or 'none'} now, not serve: look at it again.")


def _end_experiment(connection: sa.Connection, before: Rollout, after: Rollout, actor: str, result: Any) -> None:
    here = rollouts.c.assistant == before.assistant
    running = connection.execute(sa.select(rollouts.c.experiment).where(here)).scalar()
    taken = taken_back(before, after, running) if running else []
    if not taken:
        return
    why = (f"{taken[0]} was rolled back", actor)
    row = _event_row(before.assistant, after.generation, "experiment_ended", taken[0], before.champion, why)
    row["evidence"] = result
    connection.execute(sa.update(rollouts).where(here).values(experiment=sa.null()))
    connection.execute(sa.insert(rollout_events).values(row))


def _event_row(
    assistant: str, generation: int, event: str, version: str | None, previous: str | None, why: tuple[str, str]
) -> dict[str, Any]:
    return {
        "assistant": assistant,
        "generation": generation,
        "event": event,
        "version": version,
        "previous": previous,
        "reason": why[0],
        "actor": why[1],
        "created_at": now(),
    }


def _connect(url: str) -> sa.Engine:
    """An engine whose tables exist. Raises LedgerError, without the password, if the database cannot be reached."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise LedgerError(
            "FINETUNE_DATABASE_URL is no database URL; write sqlite:///PATH or postgresql://USER@HOST/NAME."
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg2")
    shown = parsed.render_as_string(hide_password=True)
    try:
        if parsed.get_backend_name() != "sqlite":
            libpq = parsed.get_driver_name() in ("psycopg2", "psycopg")
            limits = {name: value for name, value in LIBPQ.items() if libpq and name not in parsed.query}
            engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=limits)
        else:
            Path(parsed.database or "ledger.db").parent.mkdir(parents=True, exist_ok=True)
            engine = sa.create_engine(parsed, connect_args={"timeout": 30})
        prepare(engine)
        return engine
    except ModuleNotFoundError as error:
        raise LedgerError(f"FINETUNE_DATABASE_URL={shown} needs {error.name}: pip install 'finetune-assets[postgres]'.") from None
    except (SQLAlchemyError, OSError) as error:
        raise LedgerError(
            f"FINETUNE_DATABASE_URL={shown} cannot be used: {getattr(error, 'orig', None) or error}. Check that it exists, is "
            "writable, and that its disk has room."
        ) from None
