"""What Bedrock and SageMaker share: S3, names, errors, and a submission that AWS itself makes idempotent.

A job's name is the ledger's job id: a second creation of the same name attaches to the first job. Files stand under
`s3://BUCKET/PREFIX/JOB/` and are deleted after the job, where the settings say so. Plain boto3, an extra of the package.
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock

from finetune_assets.dataset.selection import common_regions, own_contacts
from finetune_assets.environment import Environment
from finetune_assets.errors import DataError, FinetuneError, ProviderError, ProviderUnsettled, SettingsError, TrainingError
from finetune_assets.storage import Store
from finetune_assets.training import aws_calls, lifecycle, prices, provider_formats, remote, screening
from finetune_assets.training.aws_files import Files
from finetune_assets.training.remote import GIVEN_UP, Connection, Journal
from finetune_assets.training.trainer import Estimate, JobHandle, JobState, Status, TrainedResult, TrainingRequest

STATUS: dict[str, Status] = {
    "InProgress": "running",
    "Stopping": "running",
    "Completed": "succeeded",
    "Failed": "failed",
    "Stopped": "cancelled",
    "MaxRuntimeExceeded": "failed",
    "MaxWaitTimeExceeded": "failed",
}
UP = ("Active", "InService")
"""A deployment that answers."""
TAKING_BACK = datetime.timedelta(hours=1)
"""For how long a deployment that was given up, and could not be deleted, is tried to be deleted again."""


UNCOUNTED = "it is billed until a person deletes it in the AWS console, and no budget counts it."


class AwsTrainer(ABC):
    """A `RemoteTrainer` over one AWS service; the services differ in what they create and describe."""

    service: ClassVar[str]

    def __init__(self, connection: Connection, store: Store, journal: Journal) -> None:
        self.provider = connection.provider
        self.connection, self._store, self._journal = connection, store, journal
        self.options: dict[str, Any] = {**connection.options, **(connection.options.get("aws") or {})}
        self._clients: dict[str, Any] = {}
        self._seconds: float | None = None

    def with_journal(self, journal: Journal) -> AwsTrainer:
        """The same service for another job."""
        other = type(self)(self.connection, self._store, journal)
        other._clients, other._seconds = self._clients, self._seconds
        return other

    def hurried(self, seconds: float) -> AwsTrainer:
        """Clients of their own, whose requests are tried once."""
        other = type(self)(self.connection, self._store, self._journal)
        other._seconds = seconds
        return other

    def close(self) -> None:
        """Closes the connections."""
        for client in self._clients.values():
            client.close()

    # the protocol

    def spec_hash(self, request: TrainingRequest) -> str:
        """Names the job's folder: what decides the result and its price."""
        terms = {name: value for name, value in self.terms.items() if value is not None}
        return remote.spec_hash(request, self.connection, {**self.parameters(request), **terms})

    def earlier_hash(self, request: TrainingRequest) -> str:
        """As it was before the terms counted: what was bought then has it in the ledger."""
        return remote.spec_hash(request, self.connection, self.parameters(request))

    def same_terms(self, connection: Connection) -> bool:
        """Whether a job over another connection was bought at this one's terms."""
        return type(self)(connection, self._store, self._journal).terms == self.terms

    def validate(self, request: TrainingRequest) -> None:
        """Settings, hyper-parameters, files and personal data here; AWS is not asked, a refusal costs nothing."""
        for name in self.needs:
            if not self.options.get(name):
                raise SettingsError(
                    f"trainer: {self.provider} needs remote.aws.{name} in the assistant's YAML, which is not set."
                )
        if self.answers_elsewhere and not self.deploys and self.connection.base_url is None:
            raise SettingsError(
                f"trainer: {self.provider}: nothing says where the tuned model will answer, so nobody could measure or serve it. "
                "Set `remote.deploy: true` (AWS bills the deployment), or remote.base_url to a gateway that speaks OpenAI's API."
            )
        self.check(request)
        self.parameters(request)
        screening.check_files(
            (path for path in self.sources(request).values() if path.exists()),
            own_contacts(self._store),
            common_regions(self._store),
        )
        self.files(request)
        known = lifecycle.find(self.provider, request.base_model, request.tables)
        least = int(self.options.get("min_model_life_days", 0))
        lifecycle.check_life(self.provider, request.base_model, least, lifecycle.today(), known)

    def estimate(self, request: TrainingRequest) -> Estimate:
        """Tokens by the length of the texts, cost by the dated table."""
        files = (file.tokens for role, file in self.files(request).items() if "validation" not in role and "heldout" not in role)
        tokens = round(sum(files) * request.hyperparameters.epochs)
        price = prices.find(self.provider, request.base_model, request.tables)
        note = f"remote.deploy makes {self.hosting(request.base_model, request.tables)}; {UNCOUNTED}" if self.deploys else ""
        return Estimate(tokens, False, None, price.of_training(tokens) if price else None, None, note=note)

    def submit(self, request: TrainingRequest) -> JobHandle:
        """Uploads and creates; the job of the same name that is there already is taken."""
        folder = self._store.job(self.spec_hash(request))
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "submit.lock"):
            state = self._journal.load()
            if not state.get("provider_job_id"):
                name = remote.slug(request.run_key, most=63)
                if (kept := self.connection.kept(state)) != self.connection:
                    self.close()
                    self.connection, self._clients = kept, {}
                self._journal.save(run_key=request.run_key, fingerprint=request.fingerprint)
                uris = {role: self._upload(role, file.path, request.run_key) for role, file in self.files(request).items()}
                sent = {"uris": uris, remote.ADDRESS: self._region}
                again = bool(state.get("create_started"))
                remote.stop_if_cancelled(self._journal, self._journal.save(**sent, create_started=True), again)
                try:
                    with self.errors("a second try to create the job" if again else "creating the job"):
                        self.create(request, name, uris)
                except ProviderUnsettled:
                    raise
                except ProviderError as error:
                    if not aws_calls.is_there(error) and not self._made_before(name, error, again):
                        self._journal.save(create_started=None)
                        raise
                self._journal.save(provider_job_id=name)
        return self._handle(request.run_key, request.fingerprint)

    def _made_before(self, name: str, no: ProviderError, again: bool) -> bool:
        """Whether a creation was refused although its job is there: an earlier request, boto3's or (`again`) ours, had made it.

        Raises ProviderUnsettled where nobody can tell.
        """
        try:
            self.told(name)
        except ProviderError as error:
            if error.status == 404 or not (again or isinstance(error, ProviderUnsettled)):
                return False
            raise ProviderUnsettled(f"{no} Whether it is there AWS does not say ({error}) {remote.MAY_BE_THERE}") from None
        return True

    def poll(self, handle: JobHandle) -> JobState:
        """Where the job is. With `remote.deploy` it has not ended before its model answers."""
        with remote.asking_for_the_job():
            told = self.told(handle.id)
        state = self.state_of(told)
        return self._deployed(handle, told, state) if state.status == "succeeded" and self.deploys else state

    @property
    def deploys(self) -> bool:
        """Whether this job's model gets a deployment of its own."""
        return bool(self.options.get("deploy"))

    def _deployed(self, handle: JobHandle, told: Mapping[str, Any], state: JobState) -> JobState:
        """Makes the deployment, once, and waits for it from tick to tick. One that fails leaves the trained model as it is."""
        journal = self._journal.load()
        if journal.get(GIVEN_UP):
            return self._taken_back(handle, told, state)
        try:
            if not journal.get("deployment"):
                with self.errors("creating the deployment"):
                    self.deploy(handle.id, self.model_of(told))
                self._journal.save(deployment=handle.id)
            word, why, _ = self.deployment(handle.id)
            if word in UP:
                return state
            if word != "Failed":
                return JobState("running", f"Deploying ({word})", None, state.progress, trained=True)
        except ProviderUnsettled:
            raise
        except ProviderError as error:
            if aws_calls.is_there(error):
                self._journal.save(deployment=handle.id)
                return JobState("running", "Deploying", None, state.progress, trained=True)
            why = str(error)
        warning = f"the model is trained ({self.model_of(told)}), but its deployment failed: {why or 'no reason given'}"
        return replace(state, progress={**state.progress, "warning": warning})

    def _taken_back(self, handle: JobHandle, told: Mapping[str, Any], state: JobState) -> JobState:
        """Of a deployment that was given up: the job has ended when it is gone, or TAKING_BACK is over."""
        left = self._take_back(handle.id)
        warning = f"the model is trained ({self.model_of(told)}), but its deployment was given up while it was being made"
        if left is not None:
            warning += f", and could not be deleted yet ({left})"
            since = datetime.datetime.fromisoformat(str(self._journal.load()[GIVEN_UP]))
            if datetime.datetime.now(datetime.UTC) - since < TAKING_BACK:
                return JobState("running", "Deleting its deployment", None, {**state.progress, "warning": warning}, trained=True)
            warning += f". Delete {handle.id} in the AWS console: it may be billed"
        return replace(state, progress={**state.progress, "warning": warning})

    def _take_back(self, name: str) -> str | None:
        """Deletes what `deploy` has made, once; why something may be left."""
        if self._journal.load().get("undeployed"):
            return None
        try:
            with self.errors(f"deleting the deployment {name}"):
                self.undeploy(name)
        except ProviderError as error:
            if error.status != 404:
                return str(error)
        self._journal.save(undeployed=True)
        return None

    def state_of(self, told: Mapping[str, Any]) -> JobState:
        """Ours of theirs; an unknown word means still running."""
        word = self.word(told)
        status = STATUS.get(word, "running")
        progress = dict(self.progress(told))
        if word not in STATUS:
            progress["warning"] = f"{self.provider} says {word!r}, which is not known here; taken as running until the deadline"
        why = told.get("FailureReason") or told.get("failureMessage") or ("no reason given" if word == "Failed" else word)
        error = f"{self.provider} ended the job: {remote.without_secrets(str(why))}" if status == "failed" else None
        return JobState(status, word, error, progress)

    def result(self, handle: JobHandle) -> TrainedResult:
        """The model's place at AWS. Raises TrainingError where the job has none."""
        told = self.told(handle.id)
        state = self.state_of(told)
        if state.status != "succeeded":
            raise TrainingError(f"Job {handle.id} has no model: {state.provider_status}. {state.error or ''}".rstrip())
        return TrainedResult(self.model_of(told), {})

    def cancel(self, handle: JobHandle) -> None:
        """Stops the job; one that stops or has ended is left alone. Of a trained one a deployment under way is taken back."""
        state = self.state_of(self.told(handle.id))
        if state.status in ("pending", "running") and state.provider_status != "Stopping":
            with self.errors(f"stopping job {handle.id}"):
                self.stop(handle.id)
        elif state.status == "succeeded" and self.deploys and self._place(handle.id) is None:
            if not self._journal.load().get(GIVEN_UP):
                self._journal.save(**{GIVEN_UP: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
            self._take_back(handle.id)  # where that fails, whoever asks for the job tries again

    def cost(self, state: JobState, base_model: str, ran: bool, tables: Path | None) -> float | None:
        """Billed tokens at the table's price, where the service tells them; a failed job may be billed too."""
        tokens = state.progress.get("trained_tokens")
        price = prices.find(self.provider, base_model, tables)
        return price.of_training(int(tokens)) if price and tokens is not None else None

    def pause(self, handle: JobHandle) -> JobState:
        """AWS holds no job."""
        raise TrainingError(f"{self.provider} cannot pause a job; cancel it instead: finetune jobs cancel {handle.run_key}.")

    def resume(self, handle: JobHandle) -> JobState:
        """AWS holds no job."""
        return self.pause(handle)

    def attach(self) -> JobHandle | None:
        """The job of this journal's name, where AWS has it although nobody wrote that down."""
        state = self._journal.load()
        if not state.get("provider_job_id"):
            if not state.get("create_started"):
                return None
            name = remote.slug(str(state["run_key"]), most=63)
            try:
                self.told(name)
            except ProviderError as error:
                if error.status != 404:
                    raise
                return None
            self._journal.save(provider_job_id=name)
        return self._handle(str(state.get("run_key") or ""), str(state.get("fingerprint") or ""))

    def events(self, handle: JobHandle, most: int | None = None) -> list[dict[str, Any]]:
        """The statuses a job has passed, oldest first, where the service tells them."""
        passed = self.told(handle.id).get("SecondaryStatusTransitions") or []
        return [
            {"message": step.get("StatusMessage") or step.get("Status"), "created_at": str(step.get("StartTime"))}
            for step in passed
        ]

    def clean_up(self, handle: JobHandle) -> list[str]:
        """Deletes the uploaded files, where the settings say so."""
        state = self._journal.load()
        if not self.options.get("delete_files", True) or state.get("files_deleted") or not state.get("run_key"):
            return []
        try:
            for part in ("input", "base"):
                self.s3.delete(f"{self.prefix(str(state['run_key']))}/{part}")
        except FinetuneError as error:
            return [str(error)]
        self._journal.save(files_deleted=True)
        return []

    def shutdown_dates(self, models: Iterable[str]) -> dict[str, datetime.date]:
        """AWS announces no day over these APIs; the dated table has to do."""
        return {}

    # what the services differ in

    @property
    def answers_elsewhere(self) -> bool:
        """Whether the finished model stays at AWS."""
        return True

    @property
    def terms(self) -> dict[str, Any]:
        """Settings that decide the result or its price beside the hyper-parameters: another value is another job."""
        return {"region": self.options.get("region")}

    def check(self, request: TrainingRequest) -> None:  # noqa: B027 - nothing to add is the usual case
        """Raises for what this service cannot train."""

    needs: ClassVar[tuple[str, ...]] = ("role", "bucket")

    @abstractmethod
    def parameters(self, request: TrainingRequest) -> dict[str, Any]:
        """Hyper-parameters as sent. Raises TrainingError for what the service does not take."""

    @abstractmethod
    def files(self, request: TrainingRequest) -> dict[str, provider_formats.Prepared]:
        """`train`, and `validation` where there is one, made and checked."""

    @abstractmethod
    def create(self, request: TrainingRequest, name: str, uris: Mapping[str, str]) -> None:
        """Creates the job."""

    @abstractmethod
    def told(self, name: str) -> dict[str, Any]:
        """What the service says of a job."""

    @abstractmethod
    def word(self, told: Mapping[str, Any]) -> str:
        """Its own status."""

    @abstractmethod
    def stop(self, name: str) -> None:
        """Stops it."""

    @abstractmethod
    def model_of(self, told: Mapping[str, Any]) -> str:
        """Where a finished job's model is."""

    @abstractmethod
    def keep(self, handle: JobHandle, folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the finished model, or its address, to a job's folder."""

    def deploy(self, name: str, model: str) -> None:
        """Makes a finished model answer under a name; the same name twice is the same deployment."""
        raise TrainingError(f"{self.provider} has nothing to deploy.")

    def undeploy(self, name: str) -> None:
        """Takes back what `deploy` has made, as far as it goes. Raises where something may be left."""
        raise TrainingError(f"{self.provider} has nothing to deploy.")

    def deployment(self, name: str) -> tuple[str, str | None, str]:
        """The service's word for a deployment's state, why it failed, and the name under which it answers."""
        raise TrainingError(f"{self.provider} has nothing to deploy.")

    def hosting(self, base_model: str, tables: Path | None) -> str:
        """What stands while a model is deployed, and its price, for people."""
        price = prices.find(self.provider, base_model, tables)
        if price is None or price.hosting_month is None:
            return f"a deployment of {base_model}, {prices.unknown(self.provider, base_model, 'hosting_month')}"
        least, most = price.hosting_month[0], price.hosting_month[-1]
        return f"a deployment of {base_model}, ${least:g} to ${most:g} a month ({price.source}, {price.date})"

    def stands(self) -> str | None:
        """The service's word for the deployment of this journal's job; null where it is not there. Raises ProviderError."""
        try:
            return self.deployment(str(self._journal.load()["deployment"]))[0]
        except ProviderError as error:
            if error.status != 404:
                raise
            return None

    def _place(self, name: str) -> str | None:
        """The name under which a deployment answers; null where it does not, or is not there."""
        try:
            word, _, place = self.deployment(name)
        except ProviderError as error:
            if error.status != 404:
                raise
            return None
        return place if word in UP else None

    def address(self, name: str, model: str) -> dict[str, Any]:
        """Where the model of a job answers, as `RemoteModel` takes it; `model`: its name at an address of the settings.

        Raises TrainingError where it answers nowhere.
        """
        region = self._region
        if self.deploys and (place := self._place(name)) is not None:
            return {"model": place, "base_url": f"{self.service}://{region}", "region": region}
        if self.connection.base_url is None:
            raise TrainingError(
                f"Job {name} has a model, which answers nowhere: its deployment is not there. Look at it in the AWS console; "
                "when it answers, run the same again."
            )
        where = {"base_url": self.connection.base_url, "key_env": self.connection.key_env, "region": region}
        return {"model": model, **where}

    def progress(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Numbers of a job that runs."""
        return {}

    # shared parts

    def _price(self, model: str) -> dict[str, Any]:
        """Price of a reply, as `RemoteModel` takes it."""
        price = prices.find(self.provider, model, Environment.read().tables)
        if price is None or price.input is None:
            return {}
        known = {"usd_per_million_input": price.input, "usd_per_million_output": price.output}
        return {**known, "priced_on": price.date.isoformat()}

    def sources(self, request: TrainingRequest) -> dict[str, Path]:
        """What is sent, by role."""
        return {"train": request.dataset / "train.jsonl", "validation": request.dataset / "validation.jsonl"}

    def prepare(
        self, request: TrainingRequest, shape: provider_formats.Shape, least: int
    ) -> dict[str, provider_formats.Prepared]:
        """The service's files in one shape; a validation set below `least` rows is left out."""
        folder = self._store.job(self.spec_hash(request)) / "upload"
        made: dict[str, provider_formats.Prepared] = {}
        for role, source in self.sources(request).items():
            if role == "validation" and (not source.exists() or source.read_bytes().count(b"\n") < least):
                continue
            if not source.exists() or source.stat().st_size == 0:
                raise DataError(f"{source} is missing or empty: there is nothing to train on. Materialise jsonl_splits again.")
            made[role] = provider_formats.write(source, folder / f"{role}.jsonl", shape, least_rows=least)
        return made

    def prefix(self, run_key: str) -> str:
        """`s3://BUCKET/PREFIX/JOB`."""
        return f"s3://{self.options['bucket']}/{str(self.options.get('prefix') or 'finetune-assets').strip('/')}/{run_key}"

    def _upload(self, role: str, path: Path, run_key: str) -> str:
        uri = f"{self.prefix(run_key)}/input/{role}.jsonl"
        self.s3.put(path, uri)
        return uri

    @property
    def s3(self) -> Files:
        """The bucket's files."""
        return Files(self.client("s3"), self.errors)

    def client(self, service: str) -> Any:
        """A boto3 client, made once. Raises SettingsError where boto3 or a region is missing."""
        if service not in self._clients:
            region = self.options.get("region") or self.connection.address
            self._clients[service] = aws_calls.client.__wrapped__(self.provider, service, region, self._seconds)
        return self._clients[service]

    @property
    def _region(self) -> str:
        return str(self.client(self.service).meta.region_name)

    def _handle(self, run_key: str, fingerprint: str) -> JobHandle:
        return JobHandle(self.provider, str(self._journal.load()["provider_job_id"]), run_key, fingerprint)

    def errors(self, doing: str) -> AbstractContextManager[None]:
        """Translates what botocore raises."""
        return aws_calls.translated(self.provider, doing)
