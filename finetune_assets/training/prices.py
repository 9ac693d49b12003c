"""What training and replies cost: the hourly rate of the local machine, and a dated table of providers' prices.

The table is `prices.yaml` beside this file, preceded by `prices.yaml` in the folder that FINETUNE_TABLES names. Nobody publishes
a maintained table of training prices, so every entry says where it comes from and when: check it before trusting a budget to it.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml

from finetune_assets.errors import SettingsError


@dataclass(frozen=True)
class Price:
    """US dollars a million tokens; null where the table does not say. `training_usd_*`: the range of a whole training instead."""

    provider: str
    model: str
    source: str
    date: datetime.date
    training: float | None = None
    input: float | None = None
    output: float | None = None
    per_training: tuple[float, float] | None = None
    hosting_month: tuple[float, float] | None = None

    def of_training(self, tokens: int) -> float | None:
        """Dollars of a training of that many tokens, epochs included; the upper end where only a range is known."""
        if self.training is not None:
            return tokens / 1e6 * self.training
        return self.per_training[1] if self.per_training else None

    def of_reply(self, input_tokens: int, output_tokens: int) -> float | None:
        """Dollars of one request."""
        if self.input is None or self.output is None:
            return None
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


def machine_usd(seconds: float, usd_per_hour: float | None) -> float | None:
    """US dollars of `seconds` on a machine; None where it has no rate."""
    return None if usd_per_hour is None else seconds / 3600 * usd_per_hour


def find(provider: str, model: str, tables: Path | None = None) -> Price | None:
    """The entry whose model name is the longest beginning of this one's; a user's table goes before the shipped one."""
    name = base_name(model)
    for prices in _tables(tables):
        fitting = [price for price in prices if price.provider == provider and name.startswith(price.model)]
        if fitting:
            return max(fitting, key=lambda price: len(price.model))
    return None


def base_name(model: str) -> str:
    """The base model in a tuned model's name: `ft:BASE:org:suffix:id` was made from BASE."""
    return model.split(":")[1] if model.startswith("ft:") and model.count(":") >= 1 else model


def missing(provider: str, model: str) -> str:
    """The mend where a budget needs a price that no table has."""
    return (
        f"No price is known for {provider} {model}. Add an entry with provider, model, training, source and date to "
        "prices.yaml in the folder that FINETUNE_TABLES names, or remove the budget."
    )


def _tables(folder: Path | None) -> list[list[Price]]:
    files = [*([folder / "prices.yaml"] if folder else []), Path(__file__).with_name("prices.yaml")]
    return [_read(file, file.stat().st_mtime_ns) for file in files if file.exists()]


@lru_cache(maxsize=8)
def _read(file: Path, _modified: int) -> list[Price]:
    try:
        entries = cast("list[dict[str, Any]]", yaml.safe_load(file.read_text(encoding="utf-8")) or [])
        return [Price(**{key: _pair(value) for key, value in entry.items()}) for entry in entries]
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"{file} is no table of prices ({str(error).splitlines()[0]}); an entry has provider, model, source, date, "
            "and training, input and output in US dollars a million tokens."
        ) from None


def _pair(value: Any) -> Any:
    return (float(value[0]), float(value[1])) if isinstance(value, list) else value
