"""OpenAI's fine-tuning API, spoken by OpenAI, Azure / Foundry, Nebius and servers that copy it: one trainer, one profile each.

What may happen between two requests is written to the journal first, so a killed process goes on where it was. A job is created
with retries switched off: two answers of 500 once gave three jobs. Before any second try the run key is looked for.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from finetune_assets.dataset.formats import read_lines
from finetune_assets.dataset.selection import common_regions, own_contacts
from finetune_assets.environment import Environment, variable
from finetune_assets.errors import DataError, FinetuneError, ProviderError, ProviderUnsettled, TrainingError
from finetune_assets.storage import Store, write_json, write_text
from finetune_assets.training import (
    lifecycle,
    prices,
    provider_formats,
    remote,
    screening,
    wire_checkpoints,
    wire_deployments,
    wire_request,
    wire_states,
)
from finetune_assets.training.provider_formats import Prepared
from finetune_assets.training.remote import DOUBTFUL, GIVEN_UP, Connection, Journal, RemoteModel
from finetune_assets.training.trainer import Estimate, JobHandle, JobState, TrainedResult, TrainingRequest
from finetune_assets.training.wire_errors import translated
from finetune_assets.training.wire_profiles import PAGE, PROFILES, address, bounded, client
from finetune_assets.training.wire_states import metrics
from finetune_assets.training.wire_submission import (
    DOUBT_SECONDS,
    ROLES,
    UNLISTED_SECONDS,
    Submission,
    file_name,
    named_files,
    seconds_since,
)

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob


class OpenAIWire:
    """The `RemoteTrainer` protocol over one of the PROFILES."""

    def __init__(self, connection: Connection, store: Store, journal: Journal, settle_seconds: float = 20.0):
        """`settle_seconds`: how long an unanswered creation is looked for before it is tried again."""
        self.provider = connection.provider
        self.connection, self.profile = connection, PROFILES[connection.provider]
        self._store, self._journal, self._settle_seconds = store, journal, settle_seconds
        self._open: OpenAI | None = None
        self._prepared: dict[str, dict[str, Prepared]] = {}

    # the protocol

    def spec_hash(self, request: TrainingRequest) -> str:
        """Names the job's folder: what decides the result."""
        return remote.spec_hash(request, self.connection, self.parameters(request))

    def validate(self, request: TrainingRequest) -> None:
        """Hyper-parameters, files and personal data here; then key, model and its last day at the provider. Spends nothing."""
        self.parameters(request)
        screening.check_files(
            (path for path in wire_request.sources(request).values() if path.exists()),
            own_contacts(self._store),
            common_regions(self._store),
        )
        self._files(request)
        known = lifecycle.find(self.provider, request.base_model, request.tables)
        least, today = int(self.connection.options.get("min_model_life_days", 0)), lifecycle.today()
        lifecycle.check_life(self.provider, request.base_model, least, today, known)
        day = self._last_day(request.base_model)
        if day is not None:
            answered = lifecycle.Lifecycle(self.provider, request.base_model, "the provider's own answer", today, None, day)
            lifecycle.check_life(self.provider, request.base_model, least, today, answered)

    def estimate(self, request: TrainingRequest) -> Estimate:
        """Tokens by the length of the texts (the provider's tokenizer is not here), cost by the dated table."""
        tokens = self._files(request)["training"].tokens * int(request.hyperparameters.epochs)
        price = prices.find(self.provider, request.base_model, request.tables)
        usd = price.of_training(tokens) if price else None
        return Estimate(tokens=tokens, exact=False, seconds=None, usd=usd, memory_bytes=None)

    def submit(self, request: TrainingRequest) -> JobHandle:
        """Uploads and creates what the journal does not have yet. Raises ProviderUnsettled where nobody can tell."""
        folder = self._store.job(self.spec_hash(request))
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "submit.lock"):
            state = self._journal.load()
            if not state.get("provider_job_id"):
                if (kept := self.connection.kept(state)) != self.connection:
                    self.close()
                    self.connection, self._open = kept, None
                prefix = str(self.connection.options.get("suffix", "finetune"))
                suffix = remote.slug(prefix, request.assistant, request.number, dots=self.provider != "azure")
                self._submission().run(request, suffix, lambda: self._files(request))
        shutil.rmtree(folder / "upload", ignore_errors=True)
        return self._handle(request.run_key, request.fingerprint)

    def poll(self, handle: JobHandle) -> JobState:
        """Where the job is; at Azure, and with `remote.deploy` at Nebius, it has not ended before its model answers.

        Raises ProviderUnsettled where the provider is busy or unreachable.
        """
        with remote.asking_for_the_job(), self._errors(f"asking for job {handle.id}"):
            answer = self._client().fine_tuning.jobs.with_raw_response.retrieve(handle.id)
            job = answer.parse()
        state = replace(self._state(job, handle.id), age=wire_states.age(job, answer.headers.get("date")))
        if state.status == "succeeded" and self.profile.by_hand:
            return self._deployed(handle, str(job.fine_tuned_model), state)
        return self._served(handle, job, state) if state.status == "succeeded" and self._serves else state

    def _deployed(self, handle: JobHandle, model: str, state: JobState) -> JobState:
        name, why = self._place(handle, model)
        if name is not None:
            return state
        do = wire_deployments.deploy_it(model, handle.id)
        state = replace(state, progress={**state.progress, "warning": f"the model is trained, but answers nowhere ({why}); {do}"})
        if self._journal.load().get(GIVEN_UP):
            return state
        return replace(state, status="running", provider_status="Not deployed", trained=True)

    def _place(self, handle: JobHandle, model: str) -> tuple[str | None, str]:
        return wire_deployments.place(self._client(), self.provider, self._key(), (model, handle.id))

    @property
    def _serves(self) -> bool:
        return self.profile.checkpoints and bool(self.connection.options.get("deploy"))

    def _served(self, handle: JobHandle, job: FineTuningJob, state: JobState) -> JobState:
        name = remote.slug(str(self._journal.load().get("suffix") or "finetune"), handle.id)
        self._store.home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._store.home / ".serve.lock")
        try:
            with self._errors("making the model answer"):
                _, status, why = wire_checkpoints.serve(self._client(), self._journal, lock, handle.id, job.model, name)
        except ProviderUnsettled:
            raise
        except TrainingError as error:
            status, why = "error", str(error)
        if status in wire_checkpoints.SERVED:
            return state
        if status not in wire_checkpoints.BROKEN:
            if not self._journal.load().get(GIVEN_UP):
                return replace(state, status="running", provider_status=f"Deploying ({status})", trained=True)
            why = f"given up while it was {status}"
        self._journal.save(served=None)
        warning = f"the model is trained, but does not answer: {why or 'no reason given'}; its files come home instead"
        return replace(state, progress={**state.progress, "warning": warning})

    def result(self, handle: JobHandle) -> TrainedResult:
        """The tuned model's name, after seeing that it is there. Raises TrainingError."""
        with self._errors(f"asking for job {handle.id}"):
            job = self._client().fine_tuning.jobs.retrieve(handle.id)
        state = self._state(job, handle.id)
        tokens = {"tokens": getattr(job, "trained_tokens", None)}
        if state.status == "succeeded" and self.profile.checkpoints:
            return TrainedResult(str(self._journal.load().get("served") or handle.id), tokens)
        if state.status != "succeeded" or not job.fine_tuned_model:
            raise TrainingError(f"Job {handle.id} has no model: {state.provider_status}. {state.error or ''}".rstrip())
        self._check_there(job.fine_tuned_model, handle.id)
        return TrainedResult(job.fine_tuned_model, tokens)

    def cancel(self, handle: JobHandle) -> None:
        """Ends the job; one that has ended is left as it is. Of a trained one the deployment is waited for no more, and of a
        doubtful one a second job ends as soon as it is listed."""
        with self._errors(f"cancelling job {handle.id}"):
            status = self._state(self._client().fine_tuning.jobs.retrieve(handle.id), handle.id).status
            waited_for = status == "succeeded" and (self._serves or self.profile.by_hand)
            if waited_for or self._journal.load().get(DOUBTFUL):
                self._journal.save(**{GIVEN_UP: True})
            if status in ("pending", "running"):
                self._client().fine_tuning.jobs.cancel(handle.id)

    def cost(self, state: JobState, base_model: str, ran: bool, tables: Path | None) -> float | None:
        """Trained tokens at the table's price; nothing for a job that failed before it ran. Else null: nobody says."""
        tokens = state.progress.get("trained_tokens")
        if not tokens and state.status == "failed" and not ran:
            return 0.0
        price = prices.find(self.provider, base_model, tables)
        return price.of_training(int(tokens)) if price and tokens is not None else None

    def pause(self, handle: JobHandle) -> JobState:
        """Holds the job."""
        with self._errors(f"pausing job {handle.id}"):
            return self._state(self._client().fine_tuning.jobs.pause(handle.id), handle.id)

    def resume(self, handle: JobHandle) -> JobState:
        """Lets a held job go on."""
        with self._errors(f"resuming job {handle.id}"):
            return self._state(self._client().fine_tuning.jobs.resume(handle.id), handle.id)

    # what only a remote job needs

    def attach(self) -> JobHandle | None:
        """Looks for a job that was created although nobody wrote down its id, and for a second one where there may be one."""
        state = self._journal.load()
        if not state.get("provider_job_id"):
            if not state.get("create_started"):
                return None
            found = self._submission().find(state)
            if found is None:
                return None
            self._journal.save(provider_job_id=found)
        elif state.get(DOUBTFUL):
            patience, found = DOUBT_SECONDS, None
            try:
                found = self._submission().find(state)
            except ProviderError:  # busy, or the key may not list
                patience = UNLISTED_SECONDS
            if found not in (None, state["provider_job_id"]):
                self._journal.save(provider_job_id=found)
            self._journal.save(**{DOUBTFUL: seconds_since(state) <= patience})
        return self._handle(str(state.get("run_key") or ""), str(state.get("fingerprint") or ""))

    def events(self, handle: JobHandle, most: int | None = None) -> list[dict[str, Any]]:
        """Events to the end, not only the first page; oldest first, each once, whatever order the provider has."""
        with self._errors(f"reading the events of job {handle.id}"):
            limit = min(most or PAGE, PAGE)
            pages = self._client().fine_tuning.jobs.list_events(handle.id, limit=limit)
            found = {event.id: event.to_dict() for event in bounded(pages, most)}
        return sorted(found.values(), key=lambda event: (event.get("created_at") or 0, str(event.get("id"))))

    def clean_up(self, handle: JobHandle) -> list[str]:
        """Deletes the uploaded files, where the settings say so: the journal's, and others of the job's names, whose upload
        was never answered."""
        state = self._journal.load()
        if not self.connection.options.get("delete_files", True) or state.get("files_deleted"):
            return []
        notes: list[str] = []
        files = {str(file) for role in ROLES if (file := state.get(f"{role}_file"))}
        try:
            if run_key := state.get("run_key"):
                with self._errors("looking for files to delete"):
                    files |= {file.id for file in named_files(self._client(), {file_name(str(run_key), role) for role in ROLES})}
        except FinetuneError as error:
            notes.append(str(error))
        for file in sorted(files):
            try:
                with self._errors(f"deleting file {file}"):
                    self._client().files.delete(file)
            except FinetuneError as error:
                if not isinstance(error, ProviderError) or error.status != 404:
                    notes.append(str(error))
        if not notes:
            self._journal.save(files_deleted=True)
        return notes

    def keep(self, handle: JobHandle, folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
        """`model/remote.json`, `model/base/remote.json`, the training log and result.json of a finished job.

        Nebius' model comes home as files, unless it was made to answer there.
        """
        trained = self.result(handle)
        points = [point for event in self.events(handle) if (point := metrics(event))]
        log = "".join(json.dumps(point) + "\n" for point in points)
        write_text(folder / "training_log.jsonl", log)
        with self._errors(f"asking for job {handle.id}"):
            job = self._client().fine_tuning.jobs.retrieve(handle.id)
        model = folder / "model"
        base = str(request["base_model"])
        if self.profile.checkpoints and not self._journal.load().get("served"):
            with self._errors(f"downloading the checkpoint of job {handle.id}"):
                wire_checkpoints.fetch(self._client(), wire_checkpoints.newest(self._client(), handle.id), model)
        else:
            name, why = self._place(handle, trained.model) if self.profile.by_hand else (trained.model, "")
            if name is None:
                do = wire_deployments.deploy_it(trained.model, handle.id)
                raise TrainingError(
                    f"Job {handle.id} has a model, which answers nowhere ({why}); {do}, then run the same again: nothing is "
                    "trained twice."
                )
            replace(self._model(name, base), of=trained.model if name != trained.model else None).write(model)
            self._model(base, base).write(model / "base")
        started, ended = getattr(job, "created_at", None), getattr(job, "finished_at", None)
        result = {
            "model": "model",
            "trainer": self.provider,
            "provider_job_id": handle.id,
            "fine_tuned_model": trained.model,
            "tokens": trained.metrics["tokens"] or 0,
            "steps": max((int(point["step"]) for point in points), default=0),
            "seconds": float(max((ended or 0) - (started or 0), 0)) if ended and started else 0.0,
            "train_loss": next((p["loss"] for p in reversed(points) if "loss" in p), None),
            "eval_loss": next((p["eval_loss"] for p in reversed(points) if "eval_loss" in p), None),
            "host": self.provider,
            **{key: request.get(key) for key in ("objective", "hyperparameters", "base_model", "seed", "usd")},
        }
        write_json(folder / "result.json", result)
        return result

    def _model(self, name: str, base: str) -> RemoteModel:
        """A model as it is asked, with its price; a tuned one costs what its base does where the table knows no better."""
        tables = Environment.read().tables
        price = prices.find(self.provider, name, tables) or prices.find(self.provider, base, tables)
        url, key_env = address(self.connection)
        known: dict[str, Any] = {"usd_per_million_input": price.input, "usd_per_million_output": price.output} if price else {}
        day = price.date.isoformat() if price and price.input is not None else None
        return RemoteModel(self.provider, name, url, key_env, priced_on=day, **known)

    def shutdown_dates(self, models: Iterable[str]) -> dict[str, datetime.date]:
        """`shutdown_date` of each model that is there, as far as the provider answers. Raises where the key is refused."""
        dates: dict[str, datetime.date] = {}
        for model in models:
            try:
                day = self._last_day(model)
            except ProviderUnsettled:
                break  # it is away: what it said until now counts
            except ProviderError as error:
                if error.status in (401, 403):
                    raise
                continue
            if day is not None:
                dates[model] = day
        return dates

    def _last_day(self, model: str) -> datetime.date | None:
        """The provider's own word. Raises ProviderError where the key is refused, or the model is not there by its own word."""
        try:
            with self._errors(f"asking for the model {model}"):
                return lifecycle.day_of(getattr(self._client().models.retrieve(model), "shutdown_date", None))
        except ProviderUnsettled:
            raise
        except ProviderError as error:
            if self.profile.strict_models or error.status in (401, 403):
                raise
            return None  # servers that copy the API often have no list of models

    # what is sent

    def parameters(self, request: TrainingRequest) -> dict[str, Any]:
        """The hyper-parameters as this provider takes them. Raises TrainingError for what it does not."""
        return wire_request.parameters(self.connection, request)

    def _files(self, request: TrainingRequest) -> dict[str, Prepared]:
        """The provider's files, made and checked once. A validation set that is too small to send is left out."""
        key = self.spec_hash(request)
        folder = self._store.job(key) / "upload"
        if key in self._prepared and folder.exists():
            return self._prepared[key]
        shape: provider_formats.Shape = "dpo" if request.objective == ("dpo",) else self.profile.shape
        made: dict[str, Prepared] = {}
        for role, source in wire_request.sources(request).items():
            if not source.exists() or (source.stat().st_size == 0 and role == "training"):
                raise DataError(f"{source} is missing or empty: there is nothing to train on. Materialise jsonl_splits again.")
            if role == "validation" and sum(1 for _ in read_lines(source)) < provider_formats.LEAST_ROWS:
                continue
            made[role] = provider_formats.write(source, folder / f"{role}.jsonl", shape, bom=self.profile.bom)
        self._prepared[key] = made
        return made

    # reading

    def _state(self, job: FineTuningJob, asked: str) -> JobState:
        return wire_states.state_of(job, asked, self.provider, self._key(), named=not self.profile.checkpoints)

    def _check_there(self, model: str, job_id: str) -> None:
        if not self.profile.strict_models:
            return
        try:
            with self._errors(f"asking for the model {model}"):
                self._client().models.retrieve(model)
        except ProviderError as error:
            if error.status != 404:
                raise
            raise TrainingError(
                f"Job {job_id} succeeded, but its model is gone ({error}) Was it deleted, or has its base been switched off? "
                f"{remote.TRAIN_AGAIN}"
            ) from None

    def _handle(self, run_key: str, fingerprint: str) -> JobHandle:
        return JobHandle(self.provider, str(self._journal.load()["provider_job_id"]), run_key, fingerprint)

    # the client

    def _key(self) -> str | None:
        return variable(self.connection.key_env or self.profile.key_env)

    def _client(self) -> OpenAI:
        """The client, made once. Raises SettingsError without a key or an address."""
        if self._open is None:
            self._open = client(self.connection)
        return self._open

    def with_journal(self, journal: Journal) -> OpenAIWire:
        """The same provider and connection for another job."""
        other = OpenAIWire(self.connection, self._store, journal, self._settle_seconds)
        other._open = self._client()
        return other

    def hurried(self, seconds: float) -> OpenAIWire:
        """The same connections, each request tried once."""
        other = OpenAIWire(self.connection, self._store, self._journal, self._settle_seconds)
        other._open = self._client().with_options(timeout=seconds, max_retries=0)
        return other

    def close(self) -> None:
        """Closes the connections."""
        if self._open is not None:
            self._open.close()

    def _submission(self) -> Submission:
        return Submission(self._client(), self.connection, self._journal, self._key(), self._settle_seconds)

    def _errors(self, doing: str) -> AbstractContextManager[None]:
        return translated(self.provider, doing, self._key())
