"""What every training back-end shares, local and remote: validate → estimate → submit → poll → result → cancel.

The handle that `submit` gives back is stored in the ledger before the first poll, so whatever dies, the next run attaches to
the job instead of paying again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune_assets.training.presets import Hyperparameters

Status = Literal["pending", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True)
class TrainingRequest:
    """One training: everything that decides its result."""

    assistant: str
    dataset: Path
    """Folder of the frozen data set."""
    fingerprint: str
    """The data set's."""
    base_model: str
    """Folder or Hugging Face id, as the assistant's YAML has it."""
    objective: tuple[str, ...]
    adapter: str
    hyperparameters: Hyperparameters
    """Preset and overrides, resolved."""
    preset: str
    seed: int
    run_key: str = ""
    """Who asked: a job of this key is never paid twice."""
    usd_per_hour: float | None = None
    """Rate of the local machine, for the estimate."""
    stages: tuple[tuple[str, Hyperparameters], ...] = ()
    """Objective and hyper-parameters of each stage of the chain; empty: `hyperparameters` for each objective."""
    text: Path | None = None
    """Folder of plain text for `continued_pretraining`."""
    precision: str | None = None
    """`float32` or `bfloat16` where the assistant's YAML says so."""
    liger: bool = False
    """Whether GPU kernels of liger-kernel take the place of the model's own."""
    checkpoints: int = 2
    """Newest ones that are kept while it trains."""
    report_to: tuple[str, ...] = ()
    """Experiment trackers."""
    overrides: dict[str, Any] = field(default_factory=dict[str, Any], hash=False)
    """Hyper-parameters that the assistant sets itself, beside its preset."""
    number: str = ""
    """`v<n>` in the tuned model's name at a provider."""
    tables: Path | None = None
    """FINETUNE_TABLES: prices and days that go before the shipped ones."""

    @property
    def chain(self) -> tuple[tuple[str, Hyperparameters], ...]:
        """The stages in order."""
        return self.stages or tuple((objective, self.hyperparameters) for objective in self.objective)


@dataclass(frozen=True)
class Estimate:
    """What a training will take."""

    tokens: int
    """Tokens of the training rows times epochs."""
    exact: bool
    """Counted with the model's own tokenizer, by the rendering that training uses."""
    seconds: float | None
    usd: float | None
    """None where no price is set."""
    memory_bytes: int | None
    """Of each process."""
    peers: int = 0
    """Finished jobs of the same model on this machine that `seconds` was taken from; 0: from the number of weights."""
    probed: bool = False
    """Whether time and memory come from ten steps of this training."""
    rows_shortened: int = 0
    """Rows that lose turns, or the beginning of their prompt, to fit; 0 where a provider cuts them itself."""
    rows_left_out: int = 0
    """Rows whose reply leaves no room for a prompt."""
    note: str = ""
    """What its reader should know of how it was made."""


@dataclass(frozen=True)
class JobHandle:
    """What finds a job again."""

    provider: str
    id: str
    run_key: str
    fingerprint: str


@dataclass(frozen=True)
class JobState:
    """Where a job is."""

    status: Status
    provider_status: str
    """The provider's own word."""
    error: str | None = None
    progress: dict[str, Any] = field(default_factory=dict[str, Any])
    """The last report: stage, step, total, loss, tokens_per_second, seconds_left."""
    trained: bool = False
    """The training has ended well and is to be paid; what a job that is still open waits for is its model's deployment."""
    age: float | None = None
    """Seconds since its creation by the provider's own clock, where its answer tells that."""


@dataclass(frozen=True)
class TrainedResult:
    """A finished model: a folder, or the id under which the provider serves it."""

    model: str
    metrics: dict[str, Any]


class Trainer(Protocol):
    """A training back-end. Provider errors are translated in it, once."""

    @property
    def provider(self) -> str:
        """`local`, `openai`, …"""
        ...

    def spec_hash(self, request: TrainingRequest) -> str:
        """Hash of what decides the result; names the job's folder."""
        ...

    def validate(self, request: TrainingRequest) -> None:
        """Refuses what cannot be trained, before anything is spent. Raises TrainingError, DataError or SettingsError."""
        ...

    def estimate(self, request: TrainingRequest) -> Estimate:
        """Tokens, time, cost and memory; spends nothing."""
        ...

    def submit(self, request: TrainingRequest) -> JobHandle:
        """Starts the job, or finds the one that was started for the same request."""
        ...

    def poll(self, handle: JobHandle) -> JobState:
        """Where the job is now."""
        ...

    def result(self, handle: JobHandle) -> TrainedResult:
        """The model of a job that succeeded. Raises TrainingError otherwise."""
        ...

    def cancel(self, handle: JobHandle) -> None:
        """Ends the job; nothing happens where it has ended already."""
        ...
