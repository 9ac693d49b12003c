"""Named sets of hyper-parameters; an assistant's `hyperparameters` override single values.

The preset is the assistant's `preset`, else what the base model's card names (`preset:` in its front matter), else `default`.
`default`, `conservative` and `aggressive` are those of the users' guide for pretrained models; `tiny` was measured on the
project's own 3-million-parameter base: full fine-tuning at 1e-3 with a cosine schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from finetune_assets.errors import SettingsError

DEFAULT_SEED = 42


@dataclass(frozen=True)
class Hyperparameters:
    """What an optimiser needs to know."""

    epochs: float
    learning_rate: float
    batch_size: int
    """Examples per optimiser step."""
    max_length: int
    """Tokens; longer examples lose their oldest turns."""
    warmup: float
    """Share of the steps."""
    weight_decay: float
    scheduler: Literal["linear", "cosine"]
    log_steps: int
    """Optimiser steps between two points of the loss curve; does not change the result."""
    patience: int = 2
    """Validations in a row without a lower loss after which a training ends early."""
    beta: float = 0.1
    """How closely `dpo` and `kto` stay with the model they start from (arXiv:2305.18290; TRL's default)."""
    lora_rank: int = 8
    lora_alpha: int = 32

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


PRESETS: dict[str, Hyperparameters] = {
    "default": Hyperparameters(3, 5e-5, 4, 1024, 0.03, 0.0, "linear", 50),
    "conservative": Hyperparameters(2, 2e-5, 4, 1024, 0.03, 0.0, "linear", 50),
    "aggressive": Hyperparameters(4, 7e-5, 4, 1024, 0.03, 0.0, "linear", 50),
    "tiny": Hyperparameters(3, 1e-3, 8, 512, 0.05, 0.0, "cosine", 10),
}

PREFERENCES = ("dpo", "kto")
OBJECTIVES = ("continued_pretraining", "tools", "sft", *PREFERENCES)
"""In the order in which a chain may have them."""

LEARNING_RATES = (1e-6, 1e-3)
EPOCHS = (1, 5)


def preset_name(wanted: str | None, card: Mapping[str, Any]) -> str:
    """The assistant's preset, else the card's, else `default`. Raises SettingsError for a name that is none."""
    name = wanted or str(card.get("preset") or "default")
    if name not in PRESETS:
        where = "the assistant's `preset`" if wanted else "`preset` in the base model's card"
        raise SettingsError(f"{where} is {name!r}; allowed: {', '.join(PRESETS)}.")
    return name


ADAPTER_RATE = 4.0
"""Learning rate of an adapter beside that of all weights: its matrices start at zero and need larger steps. Applied to a preset's
rate, never to one that the assistant's YAML sets."""

PREFERENCE_RATE = 0.1
"""Learning rate of `dpo` and `kto` beside that of `sft`: TRL's defaults are 1e-6 and 2e-5, with more data than there is here."""


def resolve(name: str, overrides: Mapping[str, Any]) -> Hyperparameters:
    """The preset with every override that is not None."""
    return replace(PRESETS[name], **_known(overrides))


def of_stage(name: str, objective: str, adapter: str, overrides: Mapping[str, Any]) -> Hyperparameters:
    """One stage of a chain: the preset as objective and adapter need it, the overrides, then those under `by_objective`.

    `dpo`, `kto` and `continued_pretraining` run for one epoch, `dpo` and `kto` at a tenth of the rate.
    """
    preset = PRESETS[name]
    rate = preset.learning_rate * (1.0 if adapter == "full" else ADAPTER_RATE)
    known = {"learning_rate": rate, **_known(overrides)}
    if objective in PREFERENCES:
        known["learning_rate"] *= PREFERENCE_RATE
    if objective not in ("sft", "tools"):
        known["epochs"] = 1
    own: Mapping[str, Any] = (overrides.get("by_objective") or {}).get(objective) or {}
    return replace(preset, **{**known, **_known(own)})


def _known(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if value is not None and key in Hyperparameters.__dataclass_fields__}


def warnings(name: str, values: Hyperparameters) -> list[str]:
    """Sentences about values outside what works for pretrained models; the `tiny` preset is for models that are none."""
    if name == "tiny":
        return []
    found: list[str] = []
    if not LEARNING_RATES[0] <= values.learning_rate <= LEARNING_RATES[1]:
        found.append(
            f"learning_rate {values.learning_rate:g} is outside {LEARNING_RATES[0]:g}..{LEARNING_RATES[1]:g}: "
            "below, little is learnt; above, a pretrained model forgets. Set hyperparameters.learning_rate."
        )
    if not EPOCHS[0] <= values.epochs <= EPOCHS[1]:
        found.append(
            f"epochs {values.epochs:g} is outside {EPOCHS[0]}..{EPOCHS[1]}: below, part of the data is not seen; "
            "above, the examples are learnt by heart. Set hyperparameters.epochs."
        )
    return found
