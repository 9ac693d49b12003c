"""When models stop: a dated table, what providers say themselves, and which of the user's models and assistants it concerns.

Dates are days in UTC. `lifecycle.yaml` beside this file is the shipped table; one of the same name in the folder that
FINETUNE_TABLES names goes before it, and a provider's `shutdown_date` before both.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from finetune_assets.errors import ModelUnavailable
from finetune_assets.training import tables as dated

WARN_DAYS = (90, 30, 7)
RULES = "provider, model, source, noted, and last_job, shutdown and base_shutdown as YYYY-MM-DD"


@dataclass(frozen=True)
class Lifecycle:
    """What is known of a model's end."""

    provider: str
    model: str
    source: str
    noted: datetime.date
    last_job: datetime.date | None = None
    shutdown: datetime.date | None = None
    base_shutdown: datetime.date | None = None
    """Of the model itself, where what was tuned on it answers longer."""


@dataclass(frozen=True)
class Use:
    """One thing of the user's that depends on a rented model."""

    assistant: str
    provider: str
    model: str
    """Base model, or tuned model's name."""
    what: str
    """`champion v3-…`, `version v2-…`, `base model in the settings`, `benchmark endpoint gpt`, `open job job-…`."""
    kind: Literal["champion", "version", "settings", "job", "asked"]
    """`asked`: a model that the settings name to be asked: a candidate of the benchmark, its judge, the router's upstream."""
    successor: str | None = None


@dataclass(frozen=True)
class Ending:
    """A use and its days."""

    use: Use
    lifecycle: Lifecycle
    days_left: int | None
    """Until the model stops answering; negative: it has stopped. Null: no day is known."""
    jobs_days_left: int | None

    @property
    def trains(self) -> int | None:
        """Until nobody can train it any more, where that is what this use is about."""
        return self.jobs_days_left if self.use.kind == "settings" else None

    @property
    def next_days(self) -> int | None:
        """Until the first thing that this use loses: the model, or its training."""
        return min((days for days in (self.days_left, self.trains) if days is not None), default=None)

    @property
    def urgent(self) -> bool:
        """Whether that comes within the first warning, or has come."""
        return _threshold(self.next_days) is not None

    @property
    def stops(self) -> bool:
        """Whether the model itself stops answering within the first warning, or has stopped."""
        return _threshold(self.days_left) is not None

    @property
    def key(self) -> str:
        """Of one warning: the same until the next threshold of either day is reached."""
        return f"{self.use.assistant}|{self.use.what}|{self.use.model}|{_threshold(self.days_left)}|{_threshold(self.trains)}"

    def text(self) -> str:
        """One sentence: what stops when, and one that says what to do."""
        use, known = self.use, self.lifecycle
        parts: list[str] = []
        if known.shutdown is not None and self.days_left is not None:
            when = f"in {self.days_left} days" if self.days_left >= 0 else f"{-self.days_left} days ago"
            stops = "stops" if self.days_left >= 0 else "stopped"
            parts.append(
                f"{use.what} of {use.assistant} ({use.provider} {use.model}) {stops} answering on {known.shutdown} ({when})"
            )
        else:
            parts.append(f"{use.what} of {use.assistant} ({use.provider} {use.model})")
        trained = use.kind == "settings" or known.shutdown is None
        if trained and known.last_job is not None and self.jobs_days_left is not None:
            verb = "is" if self.jobs_days_left >= 0 else "was"
            parts.append(f"the last day for a new training {verb} {known.last_job}")
        target = use.successor or "local/data/base_model"
        now = "Migrate now" if self.urgent else "When it is time"
        do = f"{now}: finetune migrate {use.assistant} --to {target}"
        if use.kind == "asked":
            do = f"Name another model in the settings of {use.assistant}."
        return f"{'; '.join(parts)} ({known.source}, noted {known.noted}). {do}"


def _threshold(days: int | None) -> int | None:
    """The smallest of WARN_DAYS that has been reached; 0 after the end; null before any."""
    if days is None or days > WARN_DAYS[0]:
        return None
    return 0 if days < 0 else min(step for step in WARN_DAYS if days <= step)


def day_of(said: object) -> datetime.date | None:
    """The day, UTC, that a provider's answer means: an ISO day or time, seconds since 1970, `January 14, 2027`. Null for what is
    none of these: then the dated table has to do."""
    text = str(said or "").strip()
    if not text or isinstance(said, bool):
        return None
    try:
        if text.replace(".", "", 1).isdigit() and len(text) > len("20270114"):
            seconds = float(text)
            return datetime.datetime.fromtimestamp(seconds / 1000 if seconds > 1e11 else seconds, datetime.UTC).date()
        moment = datetime.datetime.fromisoformat(text)
        return (moment.astimezone(datetime.UTC) if moment.tzinfo else moment).date()
    except (ValueError, OverflowError, OSError):
        pass
    for form in ("%Y/%m/%d", "%B %d, %Y", "%b %d, %Y", "%d %B %Y", "%d %b %Y"):
        with suppress(ValueError):
            return datetime.datetime.strptime(text, form).date()
    return None


def find(provider: str, model: str, tables: Path | None = None, *, asked: bool = False) -> Lifecycle | None:
    """What the tables know of a model's end; `asked`: it is to answer itself, not to be trained. Raises SettingsError where a
    table is none."""
    known = dated.find("lifecycle.yaml", Lifecycle, RULES, provider, model, tables)
    if known is None or known.base_shutdown is None or not asked or dated.base_name(model) != model:
        return known
    return replace(known, shutdown=known.base_shutdown)


def endings(
    uses: Iterable[Use],
    today: datetime.date,
    tables: Path | None = None,
    announced: Mapping[tuple[str, str], datetime.date] | None = None,
) -> list[Ending]:
    """What of the user's ends, soonest first. `announced`: (provider, model) to the day that the provider itself gives."""
    found: list[Ending] = []
    for use in uses:
        known = find(use.provider, use.model, tables, asked=use.kind == "asked")
        said = (announced or {}).get((use.provider, use.model))
        if said is not None:
            last_job = known.last_job if known else None
            known = Lifecycle(use.provider, use.model, "the provider's own answer", today, last_job, said)
        if known is None:
            continue
        days = (known.shutdown - today).days if known.shutdown else None
        found.append(Ending(use, known, days, (known.last_job - today).days if known.last_job else None))
    return sorted(
        found, key=lambda ending: (ending.next_days is None, ending.next_days or 0, ending.use.assistant, ending.use.what)
    )


def check_life(provider: str, model: str, least_days: int, today: datetime.date, known: Lifecycle | None) -> None:
    """Raises ModelUnavailable for a model that takes no training any more, or is switched off before `least_days` are over."""
    if known is None:
        return
    instead = "Train elsewhere: finetune migrate ASSISTANT --to local/MODEL, or another trainer."
    if known.last_job is not None and today > known.last_job:
        raise ModelUnavailable(
            f"{provider} takes no training of {model} since {known.last_job} ({known.source}, noted {known.noted}). {instead}"
        )
    days = (known.shutdown - today).days if known.shutdown is not None else least_days
    if days < least_days:
        lower = f" Or lower remote.min_model_life_days to {days}, where so short a life will do." if days >= 0 else ""
        raise ModelUnavailable(
            f"{provider} switches {model} off on {known.shutdown}, in {days} days "
            f"({known.source}, noted {known.noted}); remote.min_model_life_days is {least_days}. {instead}{lower}"
        )


def today() -> datetime.date:
    """The day, UTC."""
    return datetime.datetime.now(datetime.UTC).date()
