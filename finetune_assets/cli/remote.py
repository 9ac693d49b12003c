"""`finetune migrate`: away from a trainer, or a model, that ends."""

from __future__ import annotations

import click

from finetune_assets.environment import Environment


@click.command()
@click.argument("assistant")
@click.option("--to", "target", required=True, metavar="TRAINER/MODEL", help="E.g. local/data/base_model, azure/gpt-4.1-mini.")
@click.option("--dataset", help="Fingerprint of the frozen data set. Default: the newest one.")
@click.option("--approve", is_flag=True, help="Say yes to what the training costs (assistants with require_approval).")
@click.option("--wait", is_flag=True, help="With a rented trainer: wait for the job and go on to the report.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def migrate(assistant: str, target: str, dataset: str | None, approve: bool, wait: bool, as_json: bool) -> None:
    """Train the same frozen data set with another trainer and model, and benchmark the result beside what it replaces."""
    from finetune_assets.automation.local_run import Request
    from finetune_assets.cli.run import perform
    from finetune_assets.resources.tags import DATASET, MIGRATE_TO
    from finetune_assets.training.migration import check_target, frozen

    environment = Environment.read()
    check_target(target)
    tags = {MIGRATE_TO: target, DATASET: frozen(environment, assistant, dataset)}
    perform(Request(assistant, approved=approve, wait=wait, tags=tags), as_json)


COMMANDS: list[click.Command] = [migrate]
