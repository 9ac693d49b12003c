"""`finetune run`: the same three Dagster runs as in the UI, one after the other in this process, for one assistant.

The store is locked meanwhile, so a second run on it waits. Runs that a killed process left behind are ended first, and their
pool slots given back, since nobody else would.
"""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_shared.record import replace
from filelock import Timeout

from finetune_assets.assets.partitions import GPU_POOL
from finetune_assets.assets.partitions import assistants as assistant_partitions
from finetune_assets.assistants import Assistant, assistant_names, load_assistant
from finetune_assets.automation.failures import step_errors, stopped_by_gate
from finetune_assets.automation.jobs import CORPUS, DISTILLATION, MIGRATION, PHASE_ONE, PHASE_TWO
from finetune_assets.automation.rented import distilled_in, poll_due
from finetune_assets.automation.retrain import ACTIVE, enrolled
from finetune_assets.corpus.ingest import ingest_undated, stale_weeks
from finetune_assets.corpus.losses import losses
from finetune_assets.corpus.sources import read_source
from finetune_assets.corpus.vanished import told
from finetune_assets.environment import Environment
from finetune_assets.errors import DataError, FinetuneError, LedgerError, ModelUnavailable, SettingsError, UnknownAssistant
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import open_remote
from finetune_assets.registry.tables import OPEN_STATUSES
from finetune_assets.resources import LedgerResource, SourceResource, StoreResource, TrainerResource
from finetune_assets.resources.claims import claim, cli_owner, current_job, run_lock
from finetune_assets.resources.project import keep_source, let_go
from finetune_assets.resources.tags import APPROVED, DATASET, HOST, JOB, MIGRATE_TO, RANGE_END, RANGE_START, REASON, TEACHER
from finetune_assets.storage import Store, read_json, sweep
from finetune_assets.training import lifecycle
from finetune_assets.training.migration import retarget
from finetune_assets.training.submission import bought

STEPS = (*CORPUS, *PHASE_ONE, *PHASE_TWO)
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
DRAFT_SECONDS = 24 * 3600.0
"""Age from which an unfinished draft belongs to a process that was killed: no write takes a day."""
LONGEST_PAUSE = 30.0
"""Seconds between two questions to a provider whose job is waited for."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What a person asked for on the command line."""

    assistant: str
    until: str | None = None
    approved: bool = False
    wait: bool = False
    """With a rented trainer: go on to the report instead of ending when the job is submitted."""
    full: bool = False
    """Compare every row of the source with the store, also what has no sign of a change."""
    tags: dict[str, str] = field(default_factory=dict[str, str])
    """On the training's run, e.g. those of a migration; with MIGRATE_TO only plan and job are made."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    assistant: str
    state: str  # `reported`, `stopped` after --until, or `submitted` to a provider
    verdict: str | None = None
    reasons: list[str] = field(default_factory=list)
    version: str | None = None
    fingerprint: str | None = None
    report: str | None = None
    made: str | None = None
    job: str | None = None
    provider_job: str | None = None


class RunFailed(FinetuneError):
    """A step of the run failed; the message is the step's own."""


@contextmanager
def store_lock(home: Path, say: Say) -> Generator[None]:
    """Holds the store; says so where it has to wait for another run."""
    home.mkdir(parents=True, exist_ok=True)
    lock = run_lock(home)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Another run is at work on {home}; waiting for it to end.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def run(request: Request, definitions: dg.Definitions, say: Say, resources: Mapping[str, Any]) -> Outcome:
    """Materialises what is missing for one assistant, weeks included, up to `request.until`.

    Raises FinetuneError with the step's own message. A missed gate is a verdict: it is in the outcome.
    """
    if request.until is not None and request.until not in STEPS:
        raise SettingsError(f"--until {request.until!r} is no asset of the run; allowed: {', '.join(STEPS)}.")
    environment = Environment.read()
    with store_lock(environment.home, say), dg.DagsterInstance.get() as instance:
        return LocalRun(request, definitions, instance, environment, say, resources).run()


class LocalRun:
    """One run of one assistant; holds what its three phases share."""

    def __init__(
        self,
        request: Request,
        definitions: dg.Definitions,
        instance: dg.DagsterInstance,
        environment: Environment,
        say: Say,
        resources: Mapping[str, Any],
    ) -> None:
        # Replaced here and not for each job: a job of some of its assets refuses other resources than its assets have.
        self.definitions = replace(definitions, resources={**(definitions.resources or {}), **resources})
        self.request, self.instance, self.environment, self.say = request, instance, environment, say
        self.store = Store(environment.home)

    def run(self) -> Outcome:
        """Corpus, phase one, phase two."""
        self._end_dead_runs()
        sweep(self.environment.home, recursive=True, seconds=DRAFT_SECONDS)
        self._check_settings()
        with self._ledger():
            pass  # one that cannot be used is told before anything is made
        if MIGRATE_TO not in self.request.tags:  # a migration trains what is frozen
            self._corpus()
        if self.request.until in CORPUS:
            return Outcome(self.request.assistant, "stopped", made=str(self.environment.home / "corpus"))
        self._enrol()
        tags = {**({APPROVED: "true"} if self.request.approved else {}), **self.request.tags}
        if TEACHER in tags:
            run_id = self._execute("distil", DISTILLATION, self.request.assistant, tags)
            tags |= {DATASET: distilled_in(self.instance, run_id)}
        job, assets = ("migrate", MIGRATION) if MIGRATE_TO in tags else ("train", PHASE_ONE)
        self._execute(job, assets, self.request.assistant, tags)
        if self.request.until in PHASE_ONE:
            name, folder = self.request.assistant, self.store.datasets(self.request.assistant)
            staged, latest = folder / "staged", folder / "latest"
            if self.request.until == "training_examples":
                return Outcome(name, "stopped", made=str(staged))
            made = self.store.plan(name) if self.request.until == "training_plan" else latest
            fingerprint = latest.resolve().name if latest.exists() else None
            return Outcome(name, "stopped", fingerprint=fingerprint, made=str(made))
        return self._submitted() or self._phase_two()

    def _submitted(self) -> Outcome | None:
        """How the run ends where its job is at a provider; null where the job has succeeded, waited for if that was asked."""
        plan = read_json(self.store.plan(self.request.assistant))
        with self._ledger() as ledger:
            mine = [one for one in open_remote(ledger, self.request.assistant) if one.job.spec_hash == plan["spec_hash"]]
            if not mine:
                return None
            job = mine[0].job
            if plan.get("note"):
                self.say(plan["note"])
            if not self.request.wait:
                name, job_id, provider_job = self.request.assistant, job.id, job.provider_job_id
                return Outcome(name, "submitted", fingerprint=job.dataset_fingerprint, job=job_id, provider_job=provider_job)
            self.say(f"Waiting for {job.id} at {job.provider} ({job.provider_job_id}).")
            pause, said = 1.0, ""
            while job.status in OPEN_STATUSES:
                for one in poll_due(ledger, StoreResource(), TrainerResource(), job.id):
                    line = f"{one.provider_status}{f'  {one.note}' if one.note else ''}"
                    if line != said:
                        self.say(line)
                    said = line
                job = ledger.job(job.id)
                time.sleep(pause if job.status in OPEN_STATUSES else 0)
                pause = min(pause * 1.5, LONGEST_PAUSE)
        if job.status != "succeeded":
            raise RunFailed(f"{job.id} ended as {job.status}: {job.error or 'no reason given'}")
        return None

    def _check_settings(self) -> None:
        """Fails before anything is made if the assistant's file is wrong, or the model that is to be trained ends too soon by the
        dated table (the plan asks the provider, too); a tenant without a file is looked for in the data."""
        try:
            settings = self._settings()
        except UnknownAssistant:
            frame = read_source(self.environment.sources).conversations
            if self.request.assistant not in frame["tenant_id"].unique().to_list():
                raise
            return
        if self.request.until in STEPS[: STEPS.index("training_plan")]:
            return
        if MIGRATE_TO in self.request.tags:
            settings = retarget(settings, self.request.tags[MIGRATE_TO])
        provider, model = settings.trainer, settings.base_model
        known = lifecycle.find(provider, model, self.environment.tables)
        try:
            lifecycle.check_life(provider, model, settings.remote.min_model_life_days, lifecycle.today(), known)
        except ModelUnavailable:
            with self._ledger() as ledger:
                if not bought(ledger, settings.name, provider, model):  # else the plan knows whether it is the same training
                    raise

    def _settings(self) -> Assistant:
        path = self.store.tenants
        tenants = read_json(path) if path.exists() else {}
        return load_assistant(self.environment.assistants, self.request.assistant, tenants)

    def _end_dead_runs(self) -> None:
        """Fails active runs of the command line: the lock is ours, so whoever started them is dead."""
        for run in self.instance.get_runs(dg.RunsFilter(statuses=ACTIVE)):
            if HOST not in run.tags:
                continue
            self.instance.report_run_failed(run, "The process that ran this was killed; the next run goes on from what it left.")
            self.instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            self.say(f"Run {run.run_id[:8]} ({run.job_name}) had been killed; going on from what it left.")

    def _enrol(self) -> None:
        wanted = {*assistant_names(self.environment.assistants), self.request.assistant}
        self.instance.add_dynamic_partitions(str(assistant_partitions.name), sorted(wanted - set(enrolled(self.instance))))

    def _corpus(self) -> None:
        source = SourceResource(urls=list(self.environment.sources))
        erased = LedgerResource().erased(StoreResource().key, source.requests())
        tables = source.read(erased)
        stale = stale_weeks(self.store, tables, self.request.full)
        if not stale.all_weeks:
            for table in ("conversations", "feedback"):
                ingest_undated(self.store, tables, table, StoreResource().key)
            reasons = "\n".join(loss.sentence for loss in losses(self.store))
            raise DataError(f"No row of the source has a usable time, so there is no week to read.\n{reasons}")
        first = self.environment.first_week.isoformat()
        early = [week for week in stale.all_weeks if week < first]
        if early:
            self.say(f"{len(early)} week(s) before FINETUNE_FIRST_WEEK={first} are left out (from {early[0]}).")
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        late = [week for week in stale.all_weeks if week > today]
        if late:
            self.say(f"{len(late)} week(s) in the future are left out (up to {late[-1]}); does the source's clock run ahead?")
        weeks = [week for week in stale.stale if first <= week <= today]
        if len(early) + len(late) == len(stale.all_weeks):
            raise DataError(f"No week of the source lies between FINETUNE_FIRST_WEEK={first} and today; set it to {min(early)}.")
        if not weeks:
            self.say(f"Corpus is up to date ({len(stale.all_weeks)} weeks).")
            return
        if stale.gone:
            number = sum(stale.gone.values())
            self.say(f"{number:,} stored conversations of {told(stale.gone)}: no longer in the source, they go from the store.")
        known = {*stale.all_weeks, *stale.vanished}
        self.say(f"Corpus: {len(weeks)} of {len(known)} weeks to read, {min(weeks)} to {max(weeks)}.")
        keep_source(self.environment.sources, erased, tables)  # what was read to find stale weeks is not read again
        try:
            self._execute("prepare_corpus", CORPUS, None, {RANGE_START: min(weeks), RANGE_END: max(weeks)})
        finally:
            let_go()
        for loss in losses(self.store, first=min(weeks), last=max(weeks)):
            if loss.large:
                self.say(loss.sentence)

    def _phase_two(self) -> Outcome:
        with self._ledger() as ledger:
            job = current_job(self.store, ledger, self.request.assistant, {})
            if job.released_at is None and not claim(self.instance, ledger, job, cli_owner(), self.environment.home):
                raise LedgerError(
                    f"Job {job.id} is being released by {job.released_by}; see its run in the UI, or try again later."
                )
        self._execute("release", PHASE_TWO, self.request.assistant, {JOB: job.id})
        with self._ledger() as ledger:
            version = ledger.job(job.id).fine_tuned_model
            if self.request.until not in (None, "rollout", "registered_model") or version is None:
                return Outcome(self.request.assistant, "stopped", version=version, made=str(self.environment.home / "reports"))
            stored = ledger.version(self.request.assistant, version)
        return Outcome(
            self.request.assistant,
            "reported",
            verdict=stored.verdict,
            reasons=stored.reasons or [],
            version=version,
            fingerprint=stored.dataset_fingerprint,
            report=stored.report,
        )

    @contextmanager
    def _ledger(self) -> Generator[Ledger]:
        ledger = Ledger(self.environment.database_url)
        try:
            yield ledger
        finally:
            ledger.close()

    def _execute(self, job_name: str, assets: tuple[str, ...], partition: str | None, tags: dict[str, str]) -> str:
        """Runs a job in this process; its run's id. Raises RunFailed."""
        self._say_if_pool_is_taken(assets)
        wanted = assets[: assets.index(self.request.until) + 1] if self.request.until in assets else assets
        result = self.definitions.resolve_job_def(job_name).execute_in_process(
            run_config=QUIET,
            instance=self.instance,
            partition_key=partition,
            raise_on_error=False,
            asset_selection=None if wanted == assets else [dg.AssetKey(name) for name in wanted],
            tags={HOST: socket.gethostname(), REASON: "command line", **tags},
        )
        if result.success or stopped_by_gate(self.instance, result.run_id):
            return result.run_id
        causes = [f"{step}: {message or name}" for step, name, message in step_errors(self.instance, result.run_id)]
        raise RunFailed("\n".join(causes) or f"Run {result.run_id} of {job_name} failed without an event; see the log.")

    def _say_if_pool_is_taken(self, assets: tuple[str, ...]) -> None:
        """Where another run trains or benchmarks, the step waits for its slot in the pool: say so, since nothing else will."""
        if assets == CORPUS:
            return
        taken = self.instance.event_log_storage.get_concurrency_info(GPU_POOL).active_slot_count
        if taken:
            self.say(f"Pool {GPU_POOL!r}: {taken} other step(s) at work; training and benchmark wait for their slot.")
