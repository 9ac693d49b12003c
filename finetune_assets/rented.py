"""What `finetune doctor` says about rented trainers: keys, and what of the user's stops answering when."""

from __future__ import annotations

import datetime

from finetune_assets.assistants import Assistant, assistant_names, load_assistant
from finetune_assets.environment import Environment, variable
from finetune_assets.errors import FinetuneError
from finetune_assets.findings import Finding, Level
from finetune_assets.registry import Ledger
from finetune_assets.storage import Store, read_json
from finetune_assets.training import lifecycle
from finetune_assets.training.lifecycle import Ending
from finetune_assets.training.remote import Connection
from finetune_assets.training.trainers import credentials
from finetune_assets.training.uses import uses_of


def rented(environment: Environment, as_of: datetime.date | None = None) -> list[Finding]:
    """Keys of every provider that is used, then every rented model in use with its last day; empty where nothing is rented."""
    store = Store(environment.home)
    tenants = read_json(store.tenants) if store.tenants.exists() else {}
    settings: list[Assistant] = []
    for name in assistant_names(environment.assistants):
        try:
            settings.append(load_assistant(environment.assistants, name, tenants))
        except FinetuneError:
            continue  # told where the assistants are examined
    ledger = Ledger(environment.database_url)
    try:
        uses = uses_of(settings, ledger)
    finally:
        ledger.close()
    today = as_of or lifecycle.today()
    found = lifecycle.endings(uses.uses, today, environment.tables)
    return [*(_credentials(connection) for connection in uses.connections), *(_ending(one, today) for one in found)]


def _credentials(connection: Connection) -> Finding:
    name = credentials(connection)
    if name is None:
        return Finding("ok", connection.provider, "credentials come from the AWS chain (environment, profile, role)")
    if variable(name):
        return Finding("ok", connection.provider, f"{name} is set (not tried: the next training plan does)")
    return Finding("problem", connection.provider, f"{name} is not set; put it in the environment or in .env")


def _ending(ending: Ending, today: datetime.date) -> Finding:
    level: Level = "problem" if ending.days_left is not None and ending.days_left <= lifecycle.WARN_DAYS[1] else "warning"
    if not ending.urgent and (ending.jobs_days_left is None or ending.jobs_days_left > lifecycle.WARN_DAYS[0]):
        level = "ok"
    return Finding(level, f"model life as of {today}", ending.text())
