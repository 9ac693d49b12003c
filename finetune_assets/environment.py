"""The project's environment variables, read once per process into one frozen object.

`.env` in the project's root is read, real variables win. Relative paths resolve against the project's root.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path

from dotenv import dotenv_values

from finetune_assets.errors import SettingsError
from finetune_assets.workers import Workers

ROOT = Path(__file__).resolve().parent.parent
"""The project's root: where `dagster.yaml`, `data/` and `.env` are."""


@dataclass(frozen=True)
class Environment:
    """Where data come from, where results go, and when the weekly run starts."""

    sources: tuple[str, ...]
    home: Path
    database_url: str
    assistants: Path
    user_key: str | None
    first_week: date
    retrain_cron: str
    fresh_days: float | None = None
    monthly_usd: float | None = None
    tables: Path | None = None
    source_mapping: Path | None = None
    lookback_weeks: int = 4
    memory_gb: float = 2.0
    source_seconds: float = 600.0
    max_vanished: float = 0.5
    """Share of the stored conversations that may go in one run because the source no longer holds them."""
    workers: Workers = field(default_factory=Workers)
    report_to: tuple[str, ...] = ()
    """Experiment trackers that trainings report to, by transformers' names."""

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """Reads `variables` (default: `.env` of the root, overridden by the process's environment).

        Raises SettingsError for a first week that is not a Monday, or an unknown launcher.
        """
        if variables is None:
            variables = cls.variables()
        home = _path(variables.get("FINETUNE_HOME") or "data/store")
        return cls(
            sources=tuple(
                _source(s.strip()) for s in (variables.get("FINETUNE_SOURCE") or "data/sample").split(",") if s.strip()
            ),
            home=_folder(home),
            database_url=_database(variables.get("FINETUNE_DATABASE_URL") or f"sqlite:///{home / 'ledger.db'}"),
            assistants=_path(variables.get("FINETUNE_ASSISTANTS") or str(ROOT / "finetune_assets" / "assistants")),
            user_key=variables.get("FINETUNE_USER_KEY") or None,
            first_week=_monday(variables.get("FINETUNE_FIRST_WEEK") or "2020-01-06"),
            retrain_cron=_cron(variables.get("FINETUNE_RETRAIN_CRON") or "0 3 * * 1"),
            fresh_days=_days(variables.get("FINETUNE_FRESH_DAYS")),
            monthly_usd=_dollars(variables.get("FINETUNE_MONTHLY_USD")),
            tables=_path(folder) if (folder := variables.get("FINETUNE_TABLES")) else None,
            source_mapping=_path(given) if (given := variables.get("FINETUNE_SOURCE_MAPPING")) else None,
            lookback_weeks=int(_number(variables, "FINETUNE_LOOKBACK_WEEKS", 4, least=0)),
            memory_gb=_number(variables, "FINETUNE_MEMORY_GB", 2.0, least=0.5),
            source_seconds=_number(variables, "FINETUNE_SOURCE_SECONDS", 600.0, least=1),
            max_vanished=_number(variables, "FINETUNE_MAX_VANISHED", 0.5, least=0, most=1),
            workers=Workers.read(variables, ROOT),
            report_to=tuple(name.strip() for name in (variables.get("FINETUNE_REPORT_TO") or "").split(",") if name.strip()),
        )

    @staticmethod
    def variables() -> dict[str, str]:
        """`.env` of the root, overridden by the process's environment."""
        return {**{k: v for k, v in dotenv_values(ROOT / ".env").items() if v is not None}, **os.environ}

    @property
    def memory(self) -> int:
        """Bytes that reading and cleaning the source may take."""
        return int(self.memory_gb * 2**30)

    @property
    def dagster_storage(self) -> Path:
        """Dagster's own database and logs: in the store, so that a store and its history go together."""
        return self.home / "dagster"


@cache
def code_revision() -> str:
    """Version of this package and, in a git checkout, its commit, with `+changes` where files differ from it."""
    from finetune_assets import __version__  # noqa: PLC0415

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):  # no git, or a disk that hangs
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else None
    if not commit:
        return __version__
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "finetune_assets")
    return f"{__version__} {commit}" + ("+changes" if changes else "")


def _path(text: str) -> Path:
    path = Path(text).expanduser()
    return path if path.is_absolute() else ROOT / path


def _source(text: str) -> str:
    return text if "://" in text else str(_path(text))


def _database(url: str) -> str:
    scheme, separator, path = url.partition("sqlite:///")
    return f"sqlite:///{_path(path)}" if separator and not scheme and path and path != ":memory:" else url


def _folder(home: Path) -> Path:
    if home.exists() and not home.is_dir():
        raise SettingsError(f"FINETUNE_HOME={home} is a file; name a folder, which is made if it is missing.")
    return home


def _cron(text: str) -> str:
    if text == "0 3 * * 1":
        return text  # the default: a router's process need not import Dagster, which takes it a second
    from dagster._utils.schedules import is_valid_cron_string  # noqa: PLC0415

    if not is_valid_cron_string(text):
        raise SettingsError(
            f"FINETUNE_RETRAIN_CRON={text!r} is no cron expression; five fields, e.g. 0 3 * * 1 for Mondays at 3."
        )
    return text


def _number(variables: Mapping[str, str], name: str, default: float, least: float, most: float = 1e6) -> float:
    text = variables.get(name) or str(default)
    try:
        number = float(text)
    except ValueError:
        raise SettingsError(f"{name}={text!r} is no number; write e.g. {default}.") from None
    if not least <= number <= most:
        raise SettingsError(f"{name}={text} makes no sense; write {least:g} to {most:,.0f}.")
    return number


def _monday(text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"FINETUNE_FIRST_WEEK={text!r} is not a date; write it as YYYY-MM-DD.") from None
    if day.weekday() != 0:
        raise SettingsError(f"FINETUNE_FIRST_WEEK={text} is a {day:%A}; weeks start on Mondays, so write the Monday before.")
    return day


def _days(text: str | None) -> float | None:
    """How old the newest row of the source may be by the clock; null: as old as its own gaps are (databases), or any age."""
    if not text:
        return None
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days < 10_000:
        raise SettingsError(f"FINETUNE_FRESH_DAYS={text!r} is no number of days above 0, e.g. 2 or 0.5.")
    return days


def variable(name: str) -> str | None:
    """One variable of the process, else of `.env`; null where it is missing or empty. For keys, which no object keeps."""
    return os.environ.get(name) or dotenv_values(ROOT / ".env").get(name) or None


def _dollars(text: str | None) -> float | None:
    if not text:
        return None
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise SettingsError(f"FINETUNE_MONTHLY_USD={text!r} is no amount; write US dollars a month as a number, e.g. 50.")
    return amount
