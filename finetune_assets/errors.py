"""Every error this project raises on purpose. A message names the thing, the value, the cause and the mend.

    FinetuneError
    ├── SettingsError            an environment variable or a YAML key that makes no sense
    │   └── UnknownAssistant     no file and no tenant of that name
    ├── SourceError              a source that cannot be read, or lacks a table or a column
    ├── DataError                the data do not allow what was asked
    │   ├── NothingSelected      an assistant whose `select` matches no conversation
    │   ├── TooFewExamples       fewer training examples than `min_examples`
    │   └── LeakError            a person, a conversation or a near-duplicate stands in two splits
    ├── TrainingError            a training that could not be started or finished
    │   ├── BudgetExceeded       the estimate is above the assistant's budget
    │   ├── ModelUnavailable     a base model that cannot be loaded
    │   └── ProviderError        a rented trainer refused, or answered nonsense; its code and text are in the message
    │       ├── ProviderJobUnknown it does not know the job itself
    │       └── ProviderUnsettled  it cannot be told yet whether it has the job, or it is busy: the job stays open
    ├── LaunchError              a child process that ended badly
    ├── ServingError             a router or an upstream that cannot do what was asked
    └── LedgerError              a row that is missing, claimed by another run, or contradicts what is stored
        └── RolloutRefused       a move that the rollout's state or its guards do not allow

Provider errors are translated once, in their trainer. `exit_code` is what the command line ends with.
"""


class FinetuneError(Exception):
    """Root of the tree; `str(error)` is fit to be shown to a user."""

    exit_code = 1


class SettingsError(FinetuneError):
    """A setting that makes no sense."""

    exit_code = 2


class UnknownAssistant(SettingsError):
    """An assistant without a file and without a tenant of its name."""


class SourceError(FinetuneError):
    """A source that cannot be read."""


class DataError(FinetuneError):
    """The data do not allow what was asked."""


class NothingSelected(DataError):
    """The assistant's `select` matches no conversation."""


class TooFewExamples(DataError):
    """Fewer training examples than the assistant's `min_examples`."""


class LeakError(DataError):
    """The splits share a conversation, a user or a near-duplicate."""


class TrainingError(FinetuneError):
    """A training that could not be started or finished."""


class BudgetExceeded(TrainingError):
    """The estimate is above the assistant's budget; nothing was spent."""


class ModelUnavailable(TrainingError):
    """A base model that cannot be loaded."""


class ProviderError(TrainingError):
    """A rented trainer refused, or answered nonsense."""

    turned_away = False
    """Whether it has certainly not done what it was asked: nobody took the connection, or it was busy and said so."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None, wait: float | None = None) -> None:
        """`status`: of HTTP, 404 for what is not there however the provider says it; `code`: the provider's own word; `wait`:
        seconds for which it asks to be left alone. Null where it said none."""
        super().__init__(message)
        self.status, self.code, self.wait = status, code, wait


class ProviderUnsettled(ProviderError):
    """It cannot be told yet whether the provider has the job, or it is busy; the job stays open, a later try goes on with it."""


class ProviderJobUnknown(ProviderError):
    """The provider does not know the job that was asked for. Of its files, its model or a list such an answer says nothing."""


class LaunchError(FinetuneError):
    """A child process that ended badly."""


class LedgerError(FinetuneError):
    """A ledger row that is missing, claimed by another run, or contradicts what is stored."""


class RolloutRefused(LedgerError):
    """A move that the rollout's state or its guards do not allow."""


class ServingError(FinetuneError):
    """A router or an upstream that cannot do what was asked."""
