"""What training and replies cost: the hourly rate of the local machine, and a dated table of providers' prices.

The table is `prices.yaml` beside this file, preceded by `prices.yaml` in the folder that FINETUNE_TABLES names. Nobody publishes
a maintained table of training prices, so every entry says where it comes from and when: check it before trusting a budget to it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.training import tables as dated

RULES = "provider, model, source, date, and training, input and output in US dollars a million tokens, or hour (an instance)"


@dataclass(frozen=True)
class Price:
    """US dollars a million tokens; null where the table does not say. `per_training`: the range of a whole training instead;
    `hour`: of an instance whose type is the model."""

    provider: str
    model: str
    source: str
    date: datetime.date
    training: float | None = None
    input: float | None = None
    output: float | None = None
    per_training: Sequence[float] | None = None
    hosting_month: Sequence[float] | None = None
    hour: float | None = None

    def __post_init__(self) -> None:
        """A number that is none is told where the table is read."""
        single = (self.training, self.input, self.output, self.hour)
        for value in (*single, *(self.per_training or ()), *(self.hosting_month or ())):
            if value is not None and not isinstance(value, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{value!r} is no price")

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
    """The price of a model, tuned or not. Raises SettingsError where a table is none."""
    return dated.find("prices.yaml", Price, RULES, provider, model, tables)


def missing(provider: str, model: str, price: str = "training") -> str:
    """The mend where a budget needs a price that no table has; `price`: the keys that it is under."""
    return f"No price is known for {provider} {model}: {_entry(price)}, or remove the budget."


def unknown(provider: str, model: str, price: str) -> str:
    """What is said instead of a price that no table has, where nothing depends on it; `price`: as for `missing`."""
    return f"price unknown ({provider} {model}: {_entry(price)})"


def _entry(price: str) -> str:
    return f"add an entry with provider, model, {price}, source and date to prices.yaml in the folder that FINETUNE_TABLES names"
