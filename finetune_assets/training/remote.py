"""What all rented trainers share: where they are, what a job remembers between two requests, and what a tuned model leaves here.

A remote model is a folder with `remote.json` instead of weights. The folder is published as a version like any other, so
registry, benchmark and serving treat it alike; who asks it reads the address and the key's variable from the file.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import ProviderError, ProviderJobUnknown, ProviderUnsettled, TrainingError
from finetune_assets.storage import read_json, write_json
from finetune_assets.training.trainer import JobHandle, JobState, Trainer, TrainingRequest

RECIPE = "remote-1"
"""Version of what is sent for a request. Raise it when the same request would train something else."""
REMOTE_FILE = "remote.json"
CANCELLED = "cancelled"
"""Key of a journal: a person gave the job up before its creation was begun. Whoever uploads its files stops there."""
DOUBTFUL = "doubtful"
"""Key of a journal: a creation was not answered, so there may be a second job, which a list comes to show later."""
GIVEN_UP = "given_up"
"""Key of a journal: whoever cancelled wants no job of it to run, and no deployment to be waited for."""
ADDRESS = "address"
"""Key of a journal: `Connection.address`, saved before anything is there that costs money."""
TOO_LATE = "The job was cancelled before it was submitted; nothing was created. Start the training again."
MAY_BE_THERE = (
    "An earlier creation was not answered and may have created it, so the job stays open: the next tick, or run, looks for it."
)
TRAIN_AGAIN = (
    "Its job is not started twice: to train the same data set again here, set another hyperparameters.seed, which makes it "
    "another job. Or train it elsewhere: finetune migrate ASSISTANT --to TRAINER/MODEL."
)
"""What to do about a job whose model is gone."""
State = dict[str, Any]


@dataclass(frozen=True)
class Connection:
    """Where a provider is and how it is used; holds the name of the key's variable, never the key."""

    provider: str
    base_url: str | None = None
    key_env: str | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """The assistant's other `remote` settings."""
    address: str | None = None
    """Where a job was sent: what a variable gave then in place of base_url, or of the region of AWS. No part of its hash."""

    @classmethod
    def of(cls, assistant: Assistant) -> Connection:
        """The connection of an assistant's settings."""
        options = assistant.remote.model_dump(mode="json", exclude={"base_url", "key_env", "allowed", "successor"})
        return cls(assistant.trainer, assistant.remote.base_url, assistant.remote.key_env, options)

    def kept(self, state: Mapping[str, Any]) -> Connection:
        """The connection of a job with this journal: where it was sent, whatever a variable says now."""
        return replace(self, address=state.get(ADDRESS) or self.address)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the ledger."""
        return asdict(self)


@dataclass(frozen=True)
class RemoteModel:
    """A model that a provider serves."""

    provider: str
    model: str
    base_url: str | None = None
    key_env: str | None = None
    region: str | None = None
    usd_per_million_input: float | None = None
    usd_per_million_output: float | None = None
    priced_on: str | None = None
    of: str | None = None
    """The model's own name, where it answers under that of a deployment."""

    def write(self, folder: Path) -> None:
        """Makes the folder of this model."""
        write_json(folder / REMOTE_FILE, {key: value for key, value in asdict(self).items() if value is not None})

    @classmethod
    def read(cls, folder: str | Path) -> RemoteModel | None:
        """The model of a folder; null where it holds none, or is no folder."""
        file = Path(folder) / REMOTE_FILE
        return cls(**read_json(file)) if file.exists() else None


class Journal(Protocol):
    """What a job has done so far, written before each further request, so that whoever comes next goes on from there."""

    def load(self) -> State:
        """Everything saved; empty at first."""
        ...

    def save(self, **values: Any) -> State:
        """Adds values; they are durable when this returns. Everything saved, in the same instant."""
        ...


class Notes:
    """A journal in memory: for what needs none, such as an estimate."""

    def __init__(self) -> None:
        self.state: State = {}

    def load(self) -> State:
        """Everything saved."""
        return dict(self.state)

    def save(self, **values: Any) -> State:
        """Adds values."""
        self.state |= values
        return dict(self.state)


def stop_if_cancelled(journal: Journal, begun: State, again: bool) -> None:
    """Right before a creation, with what `journal` held when that was begun; `again`: an earlier one was not answered.

    Raises TrainingError where a person was faster, ProviderUnsettled where there may be a job all the same.
    """
    if not begun.get(CANCELLED):
        return
    if again:
        raise ProviderUnsettled(f"The job was cancelled before it was created again. {MAY_BE_THERE}")
    journal.save(create_started=None)
    raise TrainingError(TOO_LATE)


@contextmanager
def asking_for_the_job() -> Generator[None]:
    """Around the one request for a job itself: what is not there is the job. Raises ProviderJobUnknown."""
    try:
        yield
    except ProviderError as error:
        if error.status != 404:
            raise
        raise ProviderJobUnknown(str(error), error.status, error.code) from None


class RemoteTrainer(Trainer, Protocol):
    """A rented trainer: the protocol, and what only a job that runs elsewhere needs."""

    def with_journal(self, journal: Journal) -> RemoteTrainer:
        """The same provider for another job, over the same connections."""
        ...

    def hurried(self, seconds: float) -> RemoteTrainer:
        """The same provider, asked once for each answer and left after `seconds`: for whoever asks again soon anyway."""
        ...

    def close(self) -> None:
        """Gives its connections back; it and those that share them ask nothing more."""
        ...

    def attach(self) -> JobHandle | None:
        """The provider's job of this journal, where it has one, although nobody may have written down its id.

        Where it is not certain that it has only one, it looks for others and cancels them.
        """
        ...

    def cost(self, state: JobState, base_model: str, ran: bool, tables: Path | None) -> float | None:
        """US dollars that an ended job came to; null where neither the provider nor a table tells. `ran`: it was seen running."""
        ...

    def events(self, handle: JobHandle, most: int | None = None) -> list[dict[str, Any]]:
        """Events of a job, oldest first; `most`: only so many of the newest."""
        ...

    def pause(self, handle: JobHandle) -> JobState:
        """Holds the job, where the provider can."""
        ...

    def resume(self, handle: JobHandle) -> JobState:
        """Lets a held job go on."""
        ...

    def clean_up(self, handle: JobHandle) -> list[str]:
        """Deletes what was uploaded; sentences about what could not be deleted."""
        ...

    def keep(self, handle: JobHandle, folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the finished model and its log to a job's folder; its result.json. Raises TrainingError."""
        ...

    def shutdown_dates(self, models: Iterable[str]) -> dict[str, datetime.date]:
        """The day on which the provider says it stops each model; models without one, or that it does not know, are left out.

        Raises ProviderError where the key is refused.
        """
        ...


def spec_hash(request: TrainingRequest, connection: Connection, sent: Mapping[str, Any]) -> str:
    """First 16 hexadecimal digits of the sha256 of what decides the result; `sent`: what the provider gets."""
    decides = {
        "recipe": RECIPE,
        "provider": connection.provider,
        "base_url": connection.base_url,
        "dataset_fingerprint": request.fingerprint,
        "base_model": request.base_model,
        "objective": list(request.objective),
        "hyperparameters": dict(sent),
        "seed": request.seed,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def slug(*parts: str, most: int = 64, dots: bool = False) -> str:
    """Parts joined by `-`, as providers take names: letters, digits and `-`."""
    text = re.sub(r"[^A-Za-z0-9.-]+" if dots else r"[^A-Za-z0-9-]+", "-", "-".join(parts)).strip("-.")
    return re.sub(r"-{2,}", "-", text)[:most].strip("-.") or "model"


_KEY = re.compile(r"\b(sk|key|AKIA|ASIA)[-_A-Za-z0-9*]{8,}|\b[A-Fa-f0-9]{32,}\b|Bearer\s+\S+")


def without_secrets(text: str, *secrets: str | None) -> str:
    """A provider's text without keys: those that are known, and what looks like one."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[key]")
    return _KEY.sub("[key]", text)
