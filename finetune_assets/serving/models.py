"""Names under which upstreams know models, and where the embedded engine finds them. Names never change their meaning.

`dental--v12-1a2b3c4d` is a version (its hash is part of the name, so nothing is ever reloaded in place); `dental--base` is the
base model of the assistant's settings. Before a version is served its files are hashed: what is not the content that was
registered is not served, nor is a LoRA adapter on another base than the one it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.assistants import load_assistant
from finetune_assets.environment import Environment
from finetune_assets.errors import ModelUnavailable
from finetune_assets.registry import Ledger, Version
from finetune_assets.registry.rollouts import BASE
from finetune_assets.storage import Store, read_json
from finetune_assets.training import base_model
from finetune_assets.training.publish import COPIED, content_hash_of

SEPARATOR = "--"
ADAPTER = "adapter_config.json"
NOT_THE_MODEL = {*COPIED, "README.md", "card.md"}
"""What a version's folder holds beside the model."""


@dataclass(frozen=True)
class Location:
    """Where a model is: a base model (folder or id), the folder of a LoRA adapter on it, and the commit of a base by id that the
    adapter was trained on."""

    base: str
    adapter: Path | None
    revision: str | None = None


def model_name(assistant: str, version: str | None) -> str:
    """The upstream's name of a version; null: of the assistant's base model. Another assistant's version has its full name."""
    return version if version and SEPARATOR in version else f"{assistant}{SEPARATOR}{version or BASE}"


def locate(name: str, environment: Environment) -> Location:
    """Where a named model is, its content checked. Raises ModelUnavailable, LedgerError, SettingsError."""
    assistant, separator, version = name.rpartition(SEPARATOR)
    if not separator:
        raise ModelUnavailable(f"Model {name!r} is no name of this engine; names are ASSISTANT--VERSION and ASSISTANT--base.")
    store = Store(environment.home)
    if version == BASE:
        base = load_assistant(environment.assistants, assistant, tenants(store)).base_model
        return Location(base, None, base_model.revision(base))
    ledger = Ledger(environment.database_url)
    try:
        found = ledger.version(assistant, version)
        spec_hash = ledger.job(found.job_id).spec_hash
    finally:
        ledger.close()
    return _checked(found, store.job(spec_hash) / "model")


def _checked(version: Version, source: Path) -> Location:
    folder = Path(version.path)
    if not folder.is_dir():
        raise ModelUnavailable(
            f"Version {version.version} of {version.assistant}: its folder {folder} is gone. Restore it, or roll back to another."
        )
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    names = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()} if source.is_dir() else None
    wanted = sorted(there - NOT_THE_MODEL if names is None else names)
    if not set(wanted) <= there or content_hash_of(folder, wanted, version.dataset_fingerprint) != version.content_hash:
        raise ModelUnavailable(
            f"Version {version.version} of {version.assistant}: the files in {folder} are not those that were registered. It is "
            "not served; restore the folder from a backup, or train again and roll out the new version."
        )
    if (folder / ADAPTER).exists():
        return Location(version.base_model, folder, _revision(version, folder))
    return _beside(version, folder) or Location(str(folder), None)


def _beside(version: Version, folder: Path) -> Location | None:
    """The adapter that a merged model was merged of, where the very base that it was trained on is on this machine: versions on
    one base then need its memory once. None where it is not; merged weights need no base."""
    adapter = folder / "adapter"
    if not (adapter / ADAPTER).exists() or not _trained_on(folder):
        return None
    try:
        revision = _revision(version, folder)
        there = base_model.folder(version.base_model, revision)
    except ModelUnavailable:
        return None
    return Location(version.base_model, adapter, revision) if there else None


def _trained_on(folder: Path) -> dict[str, str]:
    """The base model's identity as the training wrote it down; empty where it did not."""
    spec = read_json(folder / "spec.json") if (folder / "spec.json").exists() else {}
    return spec.get("base_model_identity") or {}


def _revision(version: Version, folder: Path) -> str | None:
    """The commit of the base that an adapter was trained on, as its training wrote it down; null for a base in a folder, and
    where nothing is written down (an adapter that another trainer made). Raises ModelUnavailable where a folder holds another
    model."""
    then = _trained_on(folder)
    if "revision" in then:
        return then["revision"]
    if then and base_model.identity(version.base_model) != then:
        raise ModelUnavailable(
            f"Version {version.version} of {version.assistant}: the base model in {version.base_model} is not the one that its "
            "adapter was trained on. It is not served; restore the files of that model, or train again on the new one."
        )
    return None


def tenants(store: Store) -> Mapping[str, str]:
    """Tenant to vertical, as the corpus last saw them."""
    return read_json(store.tenants) if store.tenants.exists() else {}
