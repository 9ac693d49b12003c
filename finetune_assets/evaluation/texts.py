"""What the report says, in the assistant's language: `templates/texts.<language>.yaml`, the same keys in each. Portuguese reads
English."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml

from finetune_assets.evaluation.measures import MEASURES
from finetune_assets.evaluation.statistics import Interval

TEMPLATES = Path(__file__).parent / "templates"
LANGUAGES = ("es", "en")
MINUS = "−"
SIGNED = ("above_similarity_floor", "better_than_base", "not_worse_than_champion", "keeps_details")
"""Gates whose value is a difference."""


@dataclass(frozen=True)
class Finding:
    """What a gate found, to be told in a sentence."""

    name: str
    measure: str
    outcome: str
    interval: Interval
    limit: float
    rows: int
    rows_needed: int | None


class Texts:
    """Sentences and numbers of one language."""

    def __init__(self, language: str) -> None:
        self.language = language if language in LANGUAGES else "en"
        self._texts = _read(self.language)

    def __call__(self, key: str, **values: Any) -> str:
        """The text of a key such as `verdict.serve`, with its `{fields}` filled in. Raises KeyError for an unknown one."""
        return self._texts[key].format(**values)

    def get(self, key: str, default: str) -> str:
        """The text of a key that need not be there, e.g. an intent's name."""
        return self._texts.get(key, default)

    def candidate(self, name: str) -> str:
        """A candidate's name: the report's own, or an endpoint's."""
        return self.get(f"candidate.{name}", name.replace("_", " "))

    def number(self, value: float | None, digits: int = 2) -> str:
        """1,234.50 or 1.234,50; a dash for null."""
        if value is None or not math.isfinite(value):
            return "–"
        text = f"{value:,.{digits}f}".replace("-", MINUS)
        if float(f"{value:.{digits}f}") == 0:
            text = text.lstrip(MINUS)
        return text.translate(str.maketrans(",.", ".,")) if self.language == "es" else text

    def value(self, measure: str, value: float | None, *, signed: bool = False, more: int = 0) -> str:
        """A measure's value with its unit; `more`: digits beyond the usual ones."""
        if value is None or not math.isfinite(value):
            return "–"
        known = MEASURES[measure]
        digits = known.digits + more
        sign = "+" if signed and value > 0 else ""
        if known.form == "percent":
            points = "percent_points" if signed else "percent"
            return sign + self(points, n=self.number(value * 100, digits))
        if known.form == "bytes":
            return sign + self.size(value)
        if known.form in ("seconds", "usd"):
            return sign + self(known.form, n=self.number(value, digits))
        return sign + self.number(value, digits)

    def range(self, measure: str, interval: Interval | dict[str, float | None], *, signed: bool = False) -> str:
        """`low to high` without units twice."""
        low, high = (interval.low, interval.high) if isinstance(interval, Interval) else (interval["low"], interval["high"])
        if low is None or high is None or low == high:  # one number that was all looked at has no interval
            return ""
        return self("range", low=self.value(measure, low, signed=signed), high=self.value(measure, high, signed=signed))

    def size(self, count: float) -> str:
        """Bytes in MB or GB (powers of ten)."""
        return f"{self.number(count / 1e9, 2)} GB" if count >= 1e9 else f"{self.number(count / 1e6, 1)} MB"

    def duration(self, seconds: float | None) -> str:
        """Seconds below two minutes, else minutes, else hours."""
        if seconds is None:
            return "–"
        if seconds < 120:
            return self("seconds", n=self.number(seconds, 0 if seconds >= 10 else 1))
        if seconds < 7200:
            return self("minutes", n=self.number(seconds / 60, 1))
        return self("hours", n=self.number(seconds / 3600, 1))

    def gate(self, found: Finding) -> str:
        """Why a gate decided as it did: measure, value, interval, limit; and how many test rows would tell."""
        name, measure, interval = found.name, found.measure, found.interval
        signed = name in SIGNED
        values = {
            "value": self.value(measure, interval.value, signed=signed),
            "range": self.range(measure, interval, signed=signed) or self.value(measure, interval.value, signed=signed),
            "limit": self.value(measure, found.limit, signed=name == "not_worse_than_champion"),
            "measure": self(f"measure.{measure}"),
            "rows": self.number(found.rows, 0),
            "high": self.value(measure, interval.high),
        }
        if interval.value is None:
            return self("gate.missing", gate=self(f"gate.{name}"), **values)
        text = self(_why(name, measure, found.outcome, interval.value), **values)
        if found.outcome != "cannot_tell":
            return text
        if found.rows_needed:
            return f"{text} {self('gate.needed', n=self.number(found.rows_needed, 0))}"
        return text if name == "reply_seconds" else f"{text} {self('gate.unsettled')}"


def _why(name: str, measure: str, outcome: str, value: float) -> str:
    """Key of the sentence that tells a gate's outcome."""
    if name == "training_loss":
        return "why.training_loss"
    if name == "canaries":
        return f"why.number.canaries.{'some' if value else 'none'}"
    if name in ("parity", "checks"):
        return f"why.number.{name}"
    if name in SIGNED:
        return f"why.{name}.{'passed' if outcome == 'passed' else 'other'}"
    if value == 0 and measure in ("empty", "repeated", "personal_data", "other_tenant", "toxic", "refused"):
        return "why.none_found"
    return "why.limit.most" if MEASURES[measure].better == "lower" else "why.limit.least"


@lru_cache(maxsize=4)
def _read(language: str) -> dict[str, str]:
    loaded = cast("dict[str, Any]", yaml.safe_load((TEMPLATES / f"texts.{language}.yaml").read_text(encoding="utf-8")))
    flat: dict[str, str] = {}

    def walk(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", cast("dict[str, Any]", value))
            else:
                flat[f"{prefix}{key}"] = str(value)

    walk("", loaded)
    return flat
