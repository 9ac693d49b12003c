"""`finetune retention`: removes what the router stored and an assistant need not keep any longer."""

from __future__ import annotations

import json
from typing import Any

import click

from finetune_assets.environment import Environment
from finetune_assets.errors import SettingsError


@click.command()
@click.option("--assistant", help="Default: every assistant whose settings say `serving.keep_days`.")
@click.option("--days", type=click.IntRange(1), help="Remove what is older; default: `serving.keep_days` of the assistant.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def retention(assistant: str | None, days: int | None, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove the router's conversations, feedback and requests that are older than an assistant keeps them.

    What an open rollout or experiment is judged by stays until it has ended. Frozen data sets and models keep what they were made
    of; later builds of the corpus read no removed row. A person's request to be forgotten is `finetune erase`, which reaches
    those too. The job `apply_retention` does the same every day for each assistant with `serving.keep_days`.
    """
    if as_json and not (dry_run or yes):
        raise SettingsError("--json cannot ask; add --yes to remove, or --dry-run to see what would be removed.")
    if days is not None and assistant is None:
        raise SettingsError("--days needs --assistant: one limit for every assistant is not what each of them says.")
    from finetune_assets.registry import Ledger
    from finetune_assets.resources import StoreResource
    from finetune_assets.serving.retention import expire, stated

    environment = Environment.read()
    ledger = Ledger(environment.database_url)
    try:
        limits = {assistant: days} if assistant and days else stated(ledger, environment.assistants, StoreResource().tenants())
        if assistant:
            limits = {name: limit for name, limit in limits.items() if name == assistant}
        if not limits:
            raise SettingsError(
                f"{f'{assistant} states no limit' if assistant else 'No assistant states a limit'}, so nothing is removed: set "
                "`serving.keep_days` in its file, or give --assistant and --days."
            )
        found = {name: expire(ledger, name, limit, apply=False) for name, limit in limits.items()}
        for name, rows in found.items():
            counts = ", ".join(f"{count} {table}" for table, count in rows.items() if count)
            click.echo(f"{name}, older than {limits[name]} days: {counts or 'nothing'}", err=True)
        due = [name for name, rows in found.items() if any(rows.values())]
        if due and not dry_run:
            if not yes:
                click.confirm("Remove them for good?", abort=True, err=True)
            found |= {name: expire(ledger, name, limits[name], apply=True) for name in due}
            click.echo("Removed.", err=True)
    finally:
        ledger.close()
    if as_json:
        rows_of: list[dict[str, Any]] = [{"assistant": name, "days": limits[name], "rows": rows} for name, rows in found.items()]
        print(json.dumps({"dry_run": dry_run, "assistants": rows_of}))
