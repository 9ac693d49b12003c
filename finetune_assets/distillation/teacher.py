"""The teacher: a rented model whose replies are collected. A version of the assistant, or any TRAINER/MODEL that answers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune_assets import once
from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.training import split_target
from finetune_assets.environment import Environment, variable
from finetune_assets.errors import LedgerError, ModelUnavailable, ProviderError, ProviderUnsettled, SettingsError
from finetune_assets.registry import Ledger
from finetune_assets.training import aws_calls, lifecycle, prices
from finetune_assets.training.remote import Connection, RemoteModel
from finetune_assets.training.wire_errors import translated
from finetune_assets.training.wire_profiles import PROFILES, address, client

if TYPE_CHECKING:
    from openai import OpenAI

MOST_TOKENS = 512
"""Of a reply; a longer one is cut, and left out."""
SECONDS = 60.0
Message = dict[str, Any]


@dataclass(frozen=True)
class Teacher:
    """A rented model, and the version of the assistant that it is, if it is one."""

    model: RemoteModel
    version: str | None = None

    @property
    def name(self) -> str:
        """The version, else PROVIDER/MODEL."""
        return self.version or f"{self.model.provider}/{self.model.model}"

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: address, model and price; never a key."""
        return {"name": self.name, "version": self.version, **asdict(self.model)}


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt; `missing` says why there is no reply."""

    reply: str | None
    missing: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


Ask = Callable[[Sequence[Message]], Answer]


def find(assistant: Assistant, ledger: Ledger, wanted: str | None) -> Teacher:
    """The teacher that is named; by default the champion, else the newest rented version. Raises LedgerError, SettingsError."""
    if wanted is not None and "/" in wanted:
        return _of_target(assistant, wanted)
    versions = ledger.versions(assistant.name)
    rented = {one.version: model for one in versions if (model := RemoteModel.read(one.path)) is not None}
    champion = ledger.rollout(assistant.name).champion
    chosen = wanted or (champion if champion in rented else next(iter(rented), None))
    if chosen is None:
        raise LedgerError(
            f"{assistant.name} has no version that a provider serves. Name the teacher: --teacher openai/ft:gpt-4o-mini-…:ID."
        )
    if chosen not in rented:
        known = ", ".join(rented) or "none"
        raise LedgerError(f"{chosen!r} is no rented version of {assistant.name} (there are: {known}) and no TRAINER/MODEL.")
    return Teacher(_priced(rented[chosen]), chosen)


def _priced(model: RemoteModel) -> RemoteModel:
    """With the price of the tables where it has none of its own."""
    known = prices.find(model.provider, model.of or model.model, Environment.read().tables)
    if known is None or (model.usd_per_million_input is not None and model.usd_per_million_output is not None):
        return model
    return replace(model, usd_per_million_input=known.input, usd_per_million_output=known.output)


def _of_target(assistant: Assistant, wanted: str) -> Teacher:
    try:
        trainer, model = split_target(wanted)
    except ValueError as error:
        raise SettingsError(f"--teacher {error}.") from None
    if trainer == "local":
        raise SettingsError(f"--teacher {wanted}: a teacher is a rented model; one that is here needs no distillation.")
    connection = Connection.of(assistant) if trainer == assistant.trainer else Connection(trainer)
    if trainer not in PROFILES:
        region = assistant.remote.aws.region or variable("AWS_REGION") or ""
        return Teacher(_priced(RemoteModel(trainer, model, f"{trainer}://{region}")))
    url, key_env = address(connection)
    return Teacher(_priced(RemoteModel(trainer, model, url, key_env)))


def check_answers(teacher: Teacher) -> None:
    """Raises ModelUnavailable for a teacher that has been switched off by the dated table."""
    model = teacher.model
    known = lifecycle.find(model.provider, model.model, Environment.read().tables, asked=True)
    if known is not None and known.shutdown is not None and known.shutdown < lifecycle.today():
        raise ModelUnavailable(
            f"{teacher.name} stopped answering on {known.shutdown} ({known.source}, noted {known.noted}) and cannot be asked. "
            "What it said in production can still be learnt: --max-usd 0, and --said-since DATE where the router did not log it."
        )


@contextmanager
def asker(teacher: Teacher) -> Generator[Ask]:
    """Asks the teacher as it is served, greedily, over connections that end with the block.

    What it gives raises ProviderUnsettled where the teacher is busy or away, ProviderError where it will not answer anybody. A
    prompt is sent again only where it was turned away.
    """
    model = teacher.model
    if model.base_url is None:
        raise SettingsError(f"{teacher.name} has no address; set remote.base_url, or `remote.deploy: true`, and train it again.")
    if aws_calls.is_aws(model.base_url):
        yield _aws(model, model.base_url)
        return
    with client(Connection(model.provider, model.base_url, model.key_env), SECONDS) as opened:
        yield _openai(model, opened.with_options(max_retries=0))


def _openai(model: RemoteModel, opened: OpenAI) -> Ask:
    key = variable(model.key_env) if model.key_env else None

    def ask(prompt: Sequence[Message]) -> Answer:
        with translated(model.provider, f"asking {model.model}", key):
            made = opened.chat.completions.create(
                model=model.model,
                messages=list(prompt),  # pyright: ignore[reportArgumentType]
                max_tokens=MOST_TOKENS,
                temperature=0,
                seed=0,
            )
        return _read(made.to_dict())

    return _patient(ask)


def _aws(model: RemoteModel, url: str) -> Ask:
    def ask(prompt: Sequence[Message]) -> Answer:
        return _read(aws_calls.chat(url, model.model, {"messages": prompt, "max_tokens": MOST_TOKENS, "temperature": 0}, SECONDS))

    return _patient(ask)


def _patient(ask: Ask) -> Ask:
    """A refusal of one prompt (400, 422: a content filter, too long) is its own; any other is everybody's."""

    def asked(prompt: Sequence[Message]) -> Answer:
        for attempt in range(once.TRIES):
            try:
                return ask(prompt)
            except ProviderUnsettled as error:
                if not error.turned_away or attempt + 1 == once.TRIES:
                    raise
                once.wait(attempt, error.wait)
            except ProviderError as error:
                if error.status in (400, 422):
                    return Answer(None, "refused")
                raise
        raise AssertionError("the last try returns or raises")

    return asked


def _read(made: Any) -> Answer:
    """Of a chat completion, whatever is missing in it."""
    choices: list[Any] = made.get("choices") or [{}]
    message: dict[str, Any] = choices[0].get("message") or {}
    usage: dict[str, Any] = made.get("usage") or {}
    tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    text = message.get("content")
    if not isinstance(text, str) or not text.strip():
        return Answer(None, "called_a_tool" if message.get("tool_calls") else "empty", *tokens)
    if choices[0].get("finish_reason") == "length":
        return Answer(None, "unfinished", *tokens)
    return Answer(text.strip(), None, *tokens)
