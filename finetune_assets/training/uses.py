"""What of the user's depends on rented models: base models and addresses in settings, open jobs, versions, champions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from finetune_assets.assistants.settings import Assistant
from finetune_assets.environment import variable
from finetune_assets.errors import SettingsError
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import open_remote
from finetune_assets.training.lifecycle import Use
from finetune_assets.training.remote import Connection, RemoteModel
from finetune_assets.training.wire_profiles import PROFILES, URL_VARIABLES, address

Place = tuple[str, str | None]
"""A provider and its address; null where nothing says it, and at AWS."""
HOSTS = {
    "api.openai.com": "openai",
    ".openai.azure.com": "azure",
    ".services.ai.azure.com": "azure",
    ".cognitiveservices.azure.com": "azure",
    ".nebius.com": "nebius",
}
"""Whose a host is; one that begins with a dot is the end of a name."""


@dataclass
class Uses:
    """The uses, and where to ask about their models."""

    uses: list[Use] = field(default_factory=list[Use])
    places: dict[tuple[Place, str | None], Connection] = field(default_factory=dict[tuple[Place, str | None], Connection])
    models: dict[Place, set[str]] = field(default_factory=dict[Place, set[str]])
    """What an address is asked about: it is told no model of another one."""

    @property
    def connections(self) -> list[Connection]:
        """Each provider, address and key once."""
        return list(self.places.values())

    def at(self, connection: Connection, model: str, *, known: bool = True) -> None:
        """Remembers where a model is; `known`: this connection's key is one to ask with."""
        place = _place(connection)
        self.models.setdefault(place, set()).add(model)
        if known:
            self.places.setdefault((place, connection.key_env), connection)

    def models_at(self, connection: Connection) -> list[str]:
        """Models of these uses that a connection's address has."""
        there = self.models.get(_place(connection), set())
        return sorted(there & {use.model for use in self.uses if use.provider == connection.provider})


def uses_of(assistants: Iterable[Assistant], ledger: Ledger) -> Uses:
    """Every rented model that an assistant's settings name, that is being trained, or that one of its versions is."""
    found = Uses()
    known = {assistant.name: assistant for assistant in assistants}
    for assistant in known.values():
        _of_settings(found, assistant)
    for remote in open_remote(ledger):
        job = remote.job
        what, successor = f"base model of the open job {job.id}", _successor(known, job.assistant)
        found.uses.append(Use(job.assistant, job.provider, job.base_model, what, "job", successor))
        found.at(Connection(**remote.connection), job.base_model)
    for name in sorted({version.assistant for version in ledger.versions()}):
        champion, successor = ledger.rollout(name).champion, _successor(known, name)
        for version in ledger.versions(name):
            model = RemoteModel.read(version.path)
            if model is None:
                continue
            what, kind = f"version {version.version}", "version"
            if version.version == champion:
                what, kind = f"champion {version.version}", "champion"
            found.uses.append(Use(name, model.provider, model.of or model.model, what, kind, successor))
            found.at(Connection(model.provider, model.base_url, model.key_env), model.of or model.model)
    return found


def _of_settings(found: Uses, assistant: Assistant) -> None:
    """Its base model, its benchmark's endpoints and judge, and the upstream of the router."""
    successor = assistant.remote.successor
    if assistant.trainer != "local":
        what = "base model in the settings"
        found.uses.append(Use(assistant.name, assistant.trainer, assistant.base_model, what, "settings", successor))
        found.at(Connection.of(assistant), assistant.base_model)
    asked = [(one.url, one.model, one.api_key_env, f"benchmark endpoint {one.name}") for one in assistant.benchmark.endpoints]
    if (judge := assistant.benchmark.judge) is not None:
        asked.append((judge.url, judge.model, judge.api_key_env, "judge of the benchmark"))
    if (serving := assistant.serving).upstream != "embedded":
        model = serving.champion_model or assistant.base_model
        asked.append((serving.upstream, model, serving.upstream_key, "upstream of the router"))
    for url, model, key_env, what in asked:
        provider = provider_at(url)
        if provider is None:
            continue
        found.uses.append(Use(assistant.name, provider, model, what, "asked", successor))
        if provider in PROFILES:
            found.at(Connection(provider, url, key_env), model, known=key_env is not None)


def _place(connection: Connection) -> Place:
    try:
        return connection.provider, address(connection)[0].rstrip("/") if connection.provider in PROFILES else None
    except SettingsError:
        return connection.provider, None


def _successor(known: dict[str, Assistant], name: str) -> str | None:
    return known[name].remote.successor if name in known else None


def provider_at(url: str) -> str | None:
    """Whose an address is; null for a server of one's own."""
    parts = urlsplit(url)
    if parts.scheme in ("bedrock", "sagemaker"):
        return parts.scheme
    for provider, name in URL_VARIABLES.items():
        own = variable(name)
        if own is not None and own.rstrip("/") == url.rstrip("/"):
            return provider
    host = parts.hostname or ""
    return next((who for end, who in HOSTS.items() if host == end or (end.startswith(".") and host.endswith(end))), None)
