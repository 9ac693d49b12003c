"""`finetune run`, `status`, `doctor` and `dev`: making what is missing, and seeing what there is."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from finetune_assets.cli.console import VERDICTS, quiet, wide
from finetune_assets.environment import ROOT, Environment

if TYPE_CHECKING:
    from finetune_assets.automation.local_run import Request


@click.command()
@click.option("--assistant", required=True, help="Name of the assistant's YAML file, or of a tenant.")
@click.option("--until", help="Stop after this asset, e.g. jsonl_splits.")
@click.option("--require", type=click.Choice(["serve"]), help="End with 3 unless the verdict is this.")
@click.option("--approve", is_flag=True, help="Say yes to what the training costs (assistants with require_approval).")
@click.option("--wait", is_flag=True, help="With a remote trainer: wait for the job and go on to the report.")
@click.option("--full", is_flag=True, help="Compare every row of the source, not only what shows a sign of a change.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def run(  # noqa: PLR0913, PLR0917
    assistant: str, until: str | None, require: str | None, approve: bool, wait: bool, full: bool, as_json: bool
) -> None:
    """Materialise what is missing for one assistant, weeks included, and end with its report."""
    from finetune_assets.automation.local_run import Request

    verdict = perform(Request(assistant, until, approve, wait, full), as_json)
    if require and verdict != require:
        sys.exit(3)


def perform(request: Request, as_json: bool) -> str | None:
    """Runs a request with its progress on the terminal, and says how it ended; its verdict. A failure ends the process with 1."""
    home, assistant = Environment.read().home, request.assistant
    with quiet(home) as (terminal, output):
        from finetune_assets.automation.local_run import RunFailed
        from finetune_assets.automation.local_run import run as run_assistant
        from finetune_assets.automation.terminal import TerminalLauncher
        from finetune_assets.definitions import defs

        console = Console(file=terminal, highlight=False, soft_wrap=True)
        say: Callable[[str], None] = lambda text: console.print(text, markup=False)  # noqa: E731
        try:
            outcome = run_assistant(request, defs(), say, {"launcher": TerminalLauncher.showing(console)})
        except RunFailed as error:
            say(f"finetune: {error}\nLog: {home / 'finetune.log'}")
            if as_json:
                print(json.dumps({"assistant": assistant, "state": "failed", "error": str(error)}), file=output)
            sys.exit(1)
        if as_json:
            print(json.dumps({key: value for key, value in vars(outcome).items() if value is not None}), file=output)
        elif outcome.state == "submitted":
            say(f"Submitted {outcome.job} ({outcome.provider_job}) for {assistant}; nothing waits for it here.")
            say(f"See it: finetune jobs show {outcome.job}. The daemon goes on, or finetune run --assistant {assistant} --wait")
        elif outcome.state == "stopped":
            say(f"Done up to {request.until}: {outcome.made}")
        else:
            why = f" — {outcome.reasons[0]}" if outcome.reasons else ""
            say(f"\nVerdict  {(outcome.verdict or 'none').replace('_', ' ')}{why}")
            say(f"Version  {outcome.version} of {assistant}, data set {(outcome.fingerprint or '')[:16]}")
            say(f"Report   {outcome.report}")
    return outcome.verdict


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def status(as_json: bool) -> None:
    """Assistants, data sets, jobs, versions and rollouts in one table."""
    from finetune_assets.overview import overview

    rows = overview(Environment.read())
    if as_json:
        print(json.dumps({"assistants": rows}, default=str))
        return
    spent = [row for row in rows if row["spent_this_month_usd"] or row["open_remote_jobs"]]
    table = Table(title=f"Assistants of {Environment.read().home}", title_justify="left", box=None, pad_edge=False)
    for column in ("assistant", "weeks", "train/val/test", "data set", "last job", "newest version", "verdict", "champion"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        splits = "/".join(str(row["splits"].get(name, 0)) for name in ("train", "validation", "test")) if row["splits"] else "-"
        table.add_row(
            row["assistant"],
            str(row["weeks"] or "-"),
            splits,
            (row["fingerprint"] or "-")[:10],
            row["job_status"] or "-",
            row["version"] or "-",
            VERDICTS.get(row["verdict"], "-"),
            row["champion"] or "-",
        )
    wide().print(table)
    for row in spent:
        text = f"{row['assistant']}: ${row['spent_this_month_usd']:.2f} spent or reserved at providers this month"
        limit = f" of ${row['monthly_usd']:.2f}" if row["monthly_usd"] is not None else ""
        wide().print(f"{text}{limit}, {row['open_remote_jobs']} job(s) open there", markup=False)


@click.command()
@click.option("--as-of", type=click.DateTime(["%Y-%m-%d"]), help="See models' last days as if it were this day.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def doctor(as_of: datetime.datetime | None, as_json: bool) -> None:
    """What works here, what does not, and what to do: machine, settings, source, keys, models and their last days."""
    from finetune_assets.doctor import examine

    findings = examine(Environment.read(), as_of.date() if as_of else None)
    if as_json:
        print(json.dumps({"findings": [vars(finding) for finding in findings]}))
    else:
        marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}
        console = Console(highlight=False, soft_wrap=True)
        for finding in findings:
            console.print(f"{marks[finding.level]:<20} [bold]{finding.what}[/]: {finding.text}")
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=3000, show_default=True)
def dev(host: str, port: int) -> None:
    """The Dagster UI and daemon on this store, with a partition for every assistant file."""
    import dagster as dg

    from finetune_assets.assets.partitions import assistants as partitions
    from finetune_assets.assistants import assistant_names

    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions(str(partitions.name), assistant_names(Environment.read().assistants))
    os.chdir(ROOT)
    dagster = str(Path(sys.executable).with_name("dagster"))
    os.execv(dagster, [dagster, "dev", "-w", str(ROOT / "workspace.yaml"), "-h", host, "-p", str(port)])


COMMANDS: list[click.Command] = [run, status, doctor, dev]
