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
from finetune_assets.training.lifecycle import Ending, Use
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
    dated = {one.use for one in found}
    undated = [_undated(use, today) for use in uses.uses if use not in dated]
    keys = dict.fromkeys(map(_credentials, uses.connections))  # a version's address may be another one of the same key
    return [*keys, *(_ending(one, today) for one in found), *undated]


def _credentials(connection: Connection) -> Finding:
    name = credentials(connection)
    if name is None:
        return Finding("ok", connection.provider, "credentials come from the AWS chain (environment, profile, role)")
    if variable(name):
        return Finding("ok", connection.provider, f"{name} is set (not tried: the next training plan does)")
    return Finding("problem", connection.provider, f"{name} is not set; put it in the environment or in .env")


def _ending(ending: Ending, today: datetime.date) -> Finding:
    days = ending.next_days
    level: Level = "ok" if not ending.urgent else "problem" if days is not None and days <= lifecycle.WARN_DAYS[1] else "warning"
    return Finding(level, f"model life as of {today}", ending.text())


def _undated(use: Use, today: datetime.date) -> Finding:
    text = (
        f"{use.what} of {use.assistant} ({use.provider} {use.model}): no last day is known. Look at the provider's page, and "
        "note it in lifecycle.yaml in the folder that FINETUNE_TABLES names."
    )
    return Finding("ok", f"model life as of {today}", text)
