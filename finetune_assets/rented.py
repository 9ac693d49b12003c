"""What `finetune doctor` says about rented trainers: keys, what stands and is billed, what of the user's stops answering when."""

from __future__ import annotations

import datetime

from finetune_assets.assistants import Assistant, assistant_names, load_assistant
from finetune_assets.environment import Environment, variable
from finetune_assets.errors import FinetuneError
from finetune_assets.findings import Finding, Level
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import LedgerJournal, RemoteJob, deployed_remote
from finetune_assets.storage import Store, read_json
from finetune_assets.training import lifecycle
from finetune_assets.training.aws import UNCOUNTED
from finetune_assets.training.lifecycle import Ending, Use
from finetune_assets.training.remote import Connection
from finetune_assets.training.trainers import AWS, credentials
from finetune_assets.training.uses import uses_of

SECONDS = 5.0
"""In which AWS is asked whether a deployment still stands."""


def rented(environment: Environment, as_of: datetime.date | None = None) -> list[Finding]:
    """Keys of every provider that is used, deployments, every rented model in use and its last day; empty where there are none.

    Of providers only AWS is asked, for its deployments."""
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
        deployed = [_deployment(environment, store, ledger, remote) for remote in deployed_remote(ledger)]
    finally:
        ledger.close()
    today = as_of or lifecycle.today()
    found = lifecycle.endings(uses.uses, today, environment.tables)
    dated = {one.use for one in found}
    undated = [_undated(use, today) for use in uses.uses if use not in dated]
    keys = dict.fromkeys(map(_credentials, uses.connections))  # a version's address may be another one of the same key
    return [*keys, *(one for one in deployed if one is not None), *(_ending(one, today) for one in found), *undated]


def _credentials(connection: Connection) -> Finding:
    name = credentials(connection)
    if name is None:
        return Finding("ok", connection.provider, "credentials come from the AWS chain (environment, profile, role)")
    if variable(name):
        return Finding("ok", connection.provider, f"{name} is set (not tried: the next training plan does)")
    return Finding("problem", connection.provider, f"{name} is not set; put it in the environment or in .env")


def _deployment(environment: Environment, store: Store, ledger: Ledger, remote: RemoteJob) -> Finding | None:
    """What stands at AWS by `remote.deploy` and is billed there; null where somebody has deleted it."""
    job = remote.job
    if job.provider not in AWS:
        return None
    trainer = AWS[job.provider](Connection(**remote.connection), store, LedgerJournal(ledger, job.id)).hurried(SECONDS)
    try:
        word = trainer.stands()
    except FinetuneError as error:
        word = f"whether it still stands is unknown: {error}"
    finally:
        trainer.close()
    if word is None:
        return None
    what = trainer.hosting(job.base_model, environment.tables)
    return Finding(
        "warning",
        "deployment",
        f"{remote.state['deployment']} of {job.assistant} at {job.provider} ({word}): {what}; {UNCOUNTED}",
    )


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
