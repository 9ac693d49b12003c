"""The way to another trainer: the same assistant, the same frozen data set, another trainer and base model."""

from __future__ import annotations

from typing import Any

from finetune_assets.assistants.settings import Assistant


def retarget(assistant: Assistant, trainer: str, model: str) -> Assistant:
    """The assistant's settings with another trainer and base model. Address, key and adapter of the old one are left behind.

    Raises SettingsError through pydantic's own ValueError where the combination makes no sense.
    """
    values: dict[str, Any] = assistant.model_dump()
    values |= {"trainer": trainer, "base_model": model}
    if trainer != assistant.trainer:
        values["remote"] |= {"base_url": None, "key_env": None}
    return Assistant.model_validate(values)
