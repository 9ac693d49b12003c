"""The way to another trainer: the same assistant, the same frozen data set, another trainer and base model."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.training import split_target
from finetune_assets.environment import Environment
from finetune_assets.errors import DataError, SettingsError
from finetune_assets.storage import Store


def retarget(assistant: Assistant, target: str) -> Assistant:
    """The assistant's settings with another TRAINER/MODEL. Address, key, preset and adapter of the old one are left behind: the
    new one's come from its own variables (`wire_profiles.URL_VARIABLES`), AWS' places from `remote.aws`.

    Raises SettingsError where the combination makes no sense.
    """
    trainer, model = check_target(target)
    values: dict[str, Any] = assistant.model_dump()
    values |= {"trainer": trainer, "base_model": model}
    if trainer != assistant.trainer:
        values["remote"] |= {"base_url": None, "key_env": None}
        values |= {"preset": None, "adapter": "full"}
    if trainer == "local" and assistant.trainer != "local" and assistant.budget.usd_per_hour is None:
        values["budget"]["training_usd"] = None  # it limits a provider's bill; a machine without a rate sends none
    try:
        return Assistant.model_validate(values)
    except ValidationError as error:
        why = "; ".join(problem["msg"] for problem in error.errors())
        raise SettingsError(f"{assistant.name} cannot be trained as {target}: {why}.") from None


def check_target(target: str) -> tuple[str, str]:
    """TRAINER/MODEL as its parts. Raises SettingsError."""
    try:
        return split_target(target)
    except ValueError as error:
        raise SettingsError(f"--to {error}.") from None


def frozen(environment: Environment, assistant: str, fingerprint: str | None) -> str:
    """The fingerprint of an assistant's frozen data set, the newest one by default. Raises DataError where there is none."""
    folder = Store(environment.home).datasets(assistant) / (fingerprint or "latest")
    if not (folder / "manifest.json").exists():
        raise DataError(
            f"{assistant} has no frozen data set{f' {fingerprint}' if fingerprint else ''} in {folder.parent}; make one with "
            f"finetune run --assistant {assistant} --until jsonl_splits."
        )
    return folder.resolve().name
