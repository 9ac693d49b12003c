"""What of the user's depends on rented models: base models in settings, versions in the registry, champions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_assets.assistants.settings import Assistant
from finetune_assets.registry import Ledger
from finetune_assets.training.lifecycle import Use
from finetune_assets.training.remote import Connection, RemoteModel


@dataclass(frozen=True)
class Uses:
    """The uses, and where to ask about their models."""

    uses: list[Use]
    connections: list[Connection]


def uses_of(assistants: Iterable[Assistant], ledger: Ledger) -> Uses:
    """Every rented model that an assistant's settings name, or one of its versions is."""
    found: list[Use] = []
    connections: dict[tuple[str, str | None, str | None], Connection] = {}
    known = {assistant.name: assistant for assistant in assistants}
    for assistant in known.values():
        if assistant.trainer != "local":
            successor = assistant.remote.successor
            what = "base model in the settings"
            found.append(Use(assistant.name, assistant.trainer, assistant.base_model, what, "settings", successor))
            connection = Connection.of(assistant)
            connections[(connection.provider, connection.base_url, connection.key_env)] = connection
    for name in sorted({version.assistant for version in ledger.versions()}):
        champion = ledger.rollout(name).champion
        successor = known[name].remote.successor if name in known else None
        for version in ledger.versions(name):
            model = RemoteModel.read(version.path)
            if model is None:
                continue
            what, kind = f"version {version.version}", "version"
            if version.version == champion:
                what, kind = f"champion {version.version}", "champion"
            found.append(Use(name, model.provider, model.model, what, kind, successor))
            place = (model.provider, model.base_url, model.key_env)
            connections.setdefault(place, Connection(model.provider, model.base_url, model.key_env))
    return Uses(found, list(connections.values()))
