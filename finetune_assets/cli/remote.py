"""`finetune migrate` and `finetune distil`: away from a trainer, or a model, that ends."""

from __future__ import annotations

import datetime

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
    trainer, model = check_target(target)
    tags = {MIGRATE_TO: target, DATASET: frozen(environment, assistant, dataset)}
    perform(Request(assistant, approved=approve, wait=wait, tags=tags), as_json)
    if not as_json:
        stay = f"`trainer: {trainer}` and `base_model: {model}` in {assistant}.yaml"
        click.echo(f"To stay  set {stay}; until then the next training is where the last ones were.", err=True)


@click.command()
@click.argument("assistant")
@click.option(
    "--teacher", help="Version, or TRAINER/MODEL such as openai/ft:…. Default: the champion, else the newest rented one."
)
@click.option("--to", "target", default="local/data/base_model", show_default=True, metavar="TRAINER/MODEL", help="The student.")
@click.option("--dataset", help="Fingerprint of the frozen data set whose contexts are used. Default: the newest one.")
@click.option("--max-usd", type=click.FloatRange(min=0), help="Most US dollars for replies; 0 asks nothing: the log has to do.")
@click.option(
    "--said-since", type=click.DateTime(["%Y-%m-%d"]), help="From this day on the data set's replies are the teacher's own."
)
@click.option("--approve", is_flag=True, help="Say yes to what the training costs (assistants with require_approval).")
@click.option("--wait", is_flag=True, help="With a rented student: wait for the job and go on to the report.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def distil(
    assistant: str,
    teacher: str | None,
    target: str,
    dataset: str | None,
    max_usd: float | None,
    said_since: datetime.datetime | None,
    **how: bool,
) -> None:
    """Learn from a rented model: collect what it says to the training contexts, train another on that, and compare the two.

    Replies come from the router's log, or by asking within the budget. Each is paid once: what was begun is gone on with.
    """
    from finetune_assets.automation.local_run import Request
    from finetune_assets.cli.run import perform
    from finetune_assets.resources.tags import DATASET, MAX_USD, MIGRATE_TO, SAID_SINCE, TEACHER
    from finetune_assets.training.migration import check_target, frozen

    environment = Environment.read()
    check_target(target)
    tags = {MIGRATE_TO: target, DATASET: frozen(environment, assistant, dataset), TEACHER: teacher or "auto"}
    tags |= {} if max_usd is None else {MAX_USD: f"{max_usd:g}"}
    tags |= {} if said_since is None else {SAID_SINCE: said_since.date().isoformat()}
    perform(Request(assistant, approved=how["approve"], wait=how["wait"], tags=tags), how["as_json"])


COMMANDS: list[click.Command] = [migrate, distil]
