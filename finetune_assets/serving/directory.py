"""What every worker has to know, read from the ledger and the assistants' files, and read again within a second of a change.

On SQLite `PRAGMA data_version` tells in microseconds whether anybody else has written; on Postgres the rollouts are read at every
look, which is one small query.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from finetune_assets.assistants import Assistant, assistant_names, load_assistant
from finetune_assets.environment import Environment
from finetune_assets.errors import FinetuneError
from finetune_assets.registry import Ledger, Rollout
from finetune_assets.registry.tables import rollout_of, rollouts
from finetune_assets.registry.traffic import api_keys
from finetune_assets.serving.models import model_name, tenants
from finetune_assets.storage import Store

log = logging.getLogger(__name__)
LOOK = 0.1
"""Seconds between two looks at the ledger."""
SETTINGS = 5.0
"""Seconds between two looks at the assistants' files."""
LEDGER, FILES = "The ledger", "The assistants' files"
ADMIN = "*"
METRICS = "*metrics"
"""In place of a tenant: keys of an administrator, and keys that read `/metrics` and nothing else."""


class Key(NamedTuple):
    """Whom an API key speaks for, and whose it is."""

    tenant: str
    name: str


@dataclass(frozen=True)
class Snapshot:
    """Rollouts by assistant, valid API keys by their hash, experiments by assistant, and whether a key was ever made."""

    rollouts: dict[str, Rollout]
    keys: dict[str, Key]
    experiments: dict[str, dict[str, Any]]
    keyed: bool


class Directory:
    """The newest snapshot; a thread keeps it so. `open_door`: no key is needed until one is made (loopback only)."""

    def __init__(self, environment: Environment, ledger: Ledger, open_door: bool = False) -> None:
        self.environment, self.ledger, self.open_door = environment, ledger, open_door
        self.store = Store(environment.home)
        self.assistants: dict[str, Assistant] = {}
        self.tenants: dict[str, str] = {}
        self.snapshot = self._read()
        self.fresh = time.monotonic()
        self._settings()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="directory", daemon=True)

    def start(self) -> None:
        """Begins to follow the ledger."""
        self.thread.start()

    def close(self) -> None:
        """Stops."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(timeout=5)

    @property
    def seconds_old(self) -> float:
        """Since the ledger was last reached."""
        return time.monotonic() - self.fresh

    def rollout(self, assistant: str) -> Rollout:
        """The assistant's rollout; generation 0 where there was none yet. As long as a tenant's own assistant has no champion,
        its vertical's stands there, by its full name (`dental--v3-1a2b3c4d`): nobody falls back to the base model meanwhile."""
        found = self.snapshot.rollouts.get(assistant) or Rollout(assistant, None, 0, None)
        own = self.assistants.get(assistant)
        if found.champion is not None or own is None or own.select.tenant is None:
            return found
        vertical = self.of_vertical(own.select.tenant)
        above = self.snapshot.rollouts.get(vertical.name) if vertical else None
        return replace(found, champion=model_name(above.assistant, above.champion)) if above and above.champion else found

    @property
    def is_open(self) -> bool:
        """Whether whoever is on this machine may ask without a key; not again once a key was made, though all are revoked."""
        return self.open_door and not self.snapshot.keyed

    def key(self, text: str) -> Key | None:
        """What an API key stands for; null for an unknown one."""
        return self.snapshot.keys.get(hash_key(text)) if text else None

    def assistant_of(self, tenant: str) -> Assistant | None:
        """Who answers a tenant's users: its own assistant, else its vertical's."""
        own = (assistant for assistant in self.assistants.values() if assistant.select.tenant == tenant)
        return next(own, None) or self.of_vertical(tenant)

    def of_vertical(self, tenant: str) -> Assistant | None:
        """The assistant of a tenant's vertical."""
        vertical = self.tenants.get(tenant)
        known = (assistant for assistant in self.assistants.values() if assistant.select.vertical is not None)
        return next((assistant for assistant in known if assistant.select.vertical == vertical), None)

    def _run(self) -> None:
        connection: sa.Connection | None = None
        seen: Any = None
        settings = time.monotonic()
        told: dict[str, str] = {}
        while not self.ended.wait(LOOK):
            try:
                connection = connection or self.ledger.engine.connect()
                version = self._version(connection)
                if version is None or version != seen:
                    self.snapshot = self._read()
                    seen = version
                self.fresh = time.monotonic()
                told.pop(LEDGER, None)
            except Exception as error:  # whatever it is: a rollback has to reach this worker once it is over
                _tell(LEDGER, error, told)
                if connection is not None:
                    with suppress(Exception):  # it may be lost already
                        connection.invalidate()
                        connection.close()
                connection, seen = None, None  # data_version means something within one connection only
                self.ended.wait(0.5)
            if time.monotonic() - settings > SETTINGS:
                settings = time.monotonic()
                try:
                    self._settings()
                    told.pop(FILES, None)
                except Exception as error:
                    _tell(FILES, error, told)
        if connection is not None:
            connection.close()

    def _version(self, connection: sa.Connection) -> Any:
        if connection.dialect.name != "sqlite":
            return None
        version = connection.execute(sa.text("PRAGMA data_version")).scalar_one()
        connection.rollback()
        return version

    def _read(self) -> Snapshot:
        with self.ledger.engine.connect() as connection:
            rows = connection.execute(sa.select(rollouts)).mappings().all()
            columns = (api_keys.c.key_hash, api_keys.c.tenant_id, api_keys.c.name, api_keys.c.revoked_at)
            keys = connection.execute(sa.select(*columns)).all()
        experiments = {str(row["assistant"]): row["experiment"] for row in rows if row["experiment"]}
        return Snapshot(
            {str(row["assistant"]): rollout_of(row) for row in rows},
            {row.key_hash: Key(row.tenant_id, row.name) for row in keys if row.revoked_at is None},
            experiments,
            bool(keys),
        )

    def _settings(self) -> None:
        """Reads the files again; one that is broken keeps the settings it had."""
        known = dict(tenants(self.store))
        found: dict[str, Assistant] = {}
        names = {*assistant_names(self.environment.assistants), *self.snapshot.rollouts}
        for name in sorted(names):
            try:
                found[name] = load_assistant(self.environment.assistants, name, known)
            except FinetuneError as error:
                if name in self.assistants:
                    found[name] = self.assistants[name]
                log.warning("%s", error)
        self.assistants, self.tenants = found, known


def _tell(what: str, error: Exception, told: dict[str, str]) -> None:
    """Logs a cause once, until another one comes or all is well again. A database's own words may hold its address."""
    name, text = type(error).__name__, str(error).partition("\n")[0]
    if told.get(what) != f"{name} {text}":
        told[what] = f"{name} {text}"
        shown = name if isinstance(error, SQLAlchemyError) else f"{name}: {text}"
        log.warning("%s cannot be read (%s); what was known last stays in effect.", what, shown)


def hash_key(key: str) -> str:
    """What is stored of an API key. Keys are long and random, so a fast hash is enough."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
