"""Versions that a provider answers: their address and key instead of the engine's, and the cost of each request by its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from finetune_assets.environment import variable
from finetune_assets.serving.models import SEPARATOR, model_name
from finetune_assets.storage import Store
from finetune_assets.training.remote import RemoteModel


def rented(store: Store, assistant: str, version: str | None) -> tuple[RemoteModel, str | None] | None:
    """The provider's model of a version and its key; null for one that the upstream of the settings answers.

    A version's folder never changes; a key that does needs a restart.
    """
    owner, _, name = model_name(assistant, version).rpartition(SEPARATOR)
    try:
        return _rented(store.model(owner, name)) if version else None
    except FileNotFoundError:  # not here yet, as on a volume that came late: looked for again at the next request
        return None


@lru_cache(maxsize=1024)
def _rented(folder: Path) -> tuple[RemoteModel, str | None] | None:
    folder.stat()
    model = RemoteModel.read(folder)
    if model is None or model.base_url is None:
        return None
    return model, variable(model.key_env) if model.key_env else None


def usd(store: Store, assistant: str, version: str | None, usage: Mapping[str, int], machine_usd: float | None) -> float | None:
    """What one request cost: a provider's tokens at its price, else the machine's time. Null where neither is known."""
    found = rented(store, assistant, version)
    if found is None:
        return machine_usd
    model = found[0]
    if model.usd_per_million_input is None or model.usd_per_million_output is None or "completion_tokens" not in usage:
        return None
    tokens = usage.get("prompt_tokens", 0) * model.usd_per_million_input
    return (tokens + usage["completion_tokens"] * model.usd_per_million_output) / 1e6
