"""Who speaks OpenAI's fine-tuning API, in what they differ, and a client of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from finetune_assets.environment import variable
from finetune_assets.errors import SettingsError
from finetune_assets.training import provider_formats
from finetune_assets.training.remote import Connection

if TYPE_CHECKING:
    from openai import OpenAI

PAGE = 100
MOST_PAGES = 20
"""Pages of a list that are read: a server that always says `has_more` would be read for ever."""


@dataclass(frozen=True)
class Profile:
    """In what a provider differs from OpenAI."""

    key_env: str
    base_url: str | None = None
    shape: provider_formats.Shape = "weighted"
    dpo: bool = True
    bom: bool = False
    metadata: bool = True
    expires: bool = True
    absolute_rate: bool = False
    checkpoints: bool = False
    """A finished job names no model: its checkpoints are the model."""
    by_hand: bool = False
    """A tuned model answers once a person has deployed it."""
    strict_models: bool = False
    """`GET /models/NAME` answers 404 for a model that is not there, and for nothing else."""


PROFILES: dict[str, Profile] = {
    "openai": Profile("OPENAI_API_KEY", strict_models=True),
    "azure": Profile("AZURE_OPENAI_API_KEY", bom=True, by_hand=True),
    "nebius": Profile(
        "NEBIUS_API_KEY",
        "https://api.tokenfactory.nebius.com/v1/",
        shape="messages",
        dpo=False,
        metadata=False,
        expires=False,
        absolute_rate=True,
        checkpoints=True,
    ),
    "openai_compatible": Profile("OPENAI_COMPATIBLE_API_KEY", shape="messages", metadata=False, expires=False),
}


OPENAI_URL = "https://api.openai.com/v1"
URL_VARIABLES = {
    "openai": "OPENAI_BASE_URL",
    "azure": "AZURE_OPENAI_BASE_URL",
    "openai_compatible": "OPENAI_COMPATIBLE_BASE_URL",
}
"""Where an address may stand that the settings do not have."""


def address(connection: Connection) -> tuple[str, str]:
    """Where a provider answers, and the variable that holds its key.

    Raises SettingsError where nothing says where, or the address holds a secret.
    """
    profile = PROFILES[connection.provider]
    url = connection.base_url or connection.address or profile.base_url
    name = URL_VARIABLES.get(connection.provider, "")
    if url is None and name:
        url = variable(name)
    if url is None and connection.provider == "openai":
        url = OPENAI_URL
    if url is None:
        example = "https://RESOURCE.openai.azure.com/openai/v1/" if connection.provider == "azure" else "http://HOST/v1"
        raise SettingsError(
            f"trainer: {connection.provider} needs an address: set {name} in the environment or .env, which a migration to it "
            f"reads, too, or remote.base_url in the assistant's YAML, e.g. {example}"
        )
    if "@" in urlsplit(url).netloc:
        raise SettingsError(
            f"The address of {connection.provider} holds a user or a password, which would be written down with each job. Leave "
            f"them out; the key belongs into {connection.key_env or profile.key_env}."
        )
    return url, connection.key_env or profile.key_env


def client(connection: Connection, timeout: float = 60.0) -> OpenAI:
    """A client of a connection: address from the settings, the profile or URL_VARIABLES. Raises SettingsError."""
    from openai import OpenAI

    url, name = address(connection)
    key = variable(name)
    if key is None:
        raise SettingsError(
            f"{connection.provider} needs a key in the environment variable {name} (or in .env), which is missing. Set it, or "
            "name another one with remote.key_env."
        )
    if not key.isascii() or any(character.isspace() for character in key):
        raise SettingsError(f"The key in {name} has spaces or characters that no key has; was something else pasted?")
    return OpenAI(api_key=key, base_url=url, timeout=timeout, max_retries=2)


def bounded(pages: Any, most: int | None) -> list[Any]:
    """The items of a paginated list, each once, at most `most`; a server that says `has_more` for ever is left."""
    found: dict[str, Any] = {}
    for item in islice(pages, most or PAGE * MOST_PAGES):
        if item.id in found:
            break  # the same page again
        found[item.id] = item
    return list(found.values())


def is_mine(job: Any, state: Mapping[str, Any]) -> bool:
    """Whether a listed job is that of a journal: by its run key, else by its training file and suffix."""
    metadata = getattr(job, "metadata", None) or {}
    if metadata.get("run_key"):
        return metadata["run_key"] == state["run_key"]
    same_file = getattr(job, "training_file", None) == state.get("training_file")
    suffix = getattr(job, "suffix", None) or getattr(job, "user_provided_suffix", None)
    return same_file and suffix in (None, state.get("suffix"))
