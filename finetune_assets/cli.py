"""`finetune …`: the command line. It launches the same Dagster jobs as the UI and reads the same ledger.

Exit codes: 0 done, whatever the verdict; 1 a failure; 2 a usage error; 3 `--require serve` and another verdict.
`--json` prints one object on stdout; progress goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console
from rich.table import Table

from finetune_assets import __version__
from finetune_assets.environment import ROOT, Environment
from finetune_assets.errors import FinetuneError, SettingsError

VERDICTS = {
    "serve": "[green]serve[/]",
    "do_not_serve": "[red]do not serve[/]",
    "cannot_tell": "[yellow]cannot tell[/]",
    None: "-",
}


class Commands(click.Group):
    """Shows the project's errors as their message, with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except FinetuneError as error:
            click.echo(f"finetune: {error}", err=True)
            sys.exit(error.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Turns an assistant's conversations and feedback into a better model, and proves that it is better."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So in scripts that start this with `&`; Dagster treats SIGTERM like SIGINT, and then nothing but SIGKILL would end it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("DAGSTER_HOME", str(ROOT))
    os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")


@main.command()
@click.option("--assistant", required=True, help="Name of the assistant's YAML file, or of a tenant.")
@click.option("--until", help="Stop after this asset, e.g. jsonl_splits.")
@click.option("--require", type=click.Choice(["serve"]), help="End with 3 unless the verdict is this.")
@click.option("--approve", is_flag=True, help="Say yes to what the training costs (assistants with require_approval).")
@click.option("--wait", is_flag=True, help="With a remote trainer: wait for the job and go on to the report.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def run(assistant: str, until: str | None, require: str | None, approve: bool, wait: bool, as_json: bool) -> None:
    """Materialise what is missing for one assistant, weeks included, and end with its report."""
    del wait  # the local trainer always runs to its end
    home = Environment.read().home
    with _quiet(home) as (terminal, output):
        from finetune_assets.automation.local_run import Request, RunFailed
        from finetune_assets.automation.local_run import run as run_assistant
        from finetune_assets.automation.terminal import TerminalLauncher
        from finetune_assets.definitions import defs

        console = Console(file=terminal, highlight=False, soft_wrap=True)
        say: Callable[[str], None] = lambda text: console.print(text, markup=False)  # noqa: E731
        request = Request(assistant, until, approve)
        try:
            outcome = run_assistant(request, defs(), say, {"launcher": TerminalLauncher.showing(console)})
        except RunFailed as error:
            say(f"finetune: {error}\nLog: {home / 'finetune.log'}")
            if as_json:
                print(json.dumps({"assistant": assistant, "state": "failed", "error": str(error)}), file=output)
            sys.exit(1)
        if as_json:
            print(json.dumps({key: value for key, value in vars(outcome).items() if value is not None}), file=output)
        elif outcome.state == "stopped":
            say(f"Done up to {until}: {outcome.made}")
        else:
            why = f" — {outcome.reasons[0]}" if outcome.reasons else ""
            say(f"\nVerdict  {(outcome.verdict or 'none').replace('_', ' ')}{why}")
            say(f"Version  {outcome.version} of {assistant}, data set {(outcome.fingerprint or '')[:16]}")
            say(f"Report   {outcome.report}")
    if require and outcome.verdict != require:
        sys.exit(3)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def status(as_json: bool) -> None:
    """Assistants, data sets, jobs, versions and rollouts in one table."""
    from finetune_assets.overview import overview

    rows = overview(Environment.read())
    if as_json:
        print(json.dumps({"assistants": rows}, default=str))
        return
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
    _wide().print(table)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def doctor(as_json: bool) -> None:
    """What works here, what does not, and what to do: machine, settings, source, base models, data volume."""
    from finetune_assets.doctor import examine

    findings = examine(Environment.read())
    if as_json:
        print(json.dumps({"findings": [vars(finding) for finding in findings]}))
    else:
        marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}
        console = Console(highlight=False, soft_wrap=True)
        for finding in findings:
            console.print(f"{marks[finding.level]:<20} [bold]{finding.what}[/]: {finding.text}")
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)


@main.command()
@click.option("--assistant", required=True)
@click.option("--version", help="Default: the champion, else the newest version.")
def chat(assistant: str, version: str | None) -> None:
    """Talk to the champion, or to a candidate, in the terminal. An empty line or Ctrl-D ends it."""
    from finetune_assets.chat import Chat

    with Chat.start(Environment.read(), assistant, version) as session:
        print(f"{session.title}\nAn empty line ends the chat.", file=sys.stderr)
        while True:
            try:
                text = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if not text:
                break
            print(session.reply(text), flush=True)


@main.group()
def jobs() -> None:
    """Training jobs, local and remote."""


@jobs.command("list")
@click.option("--assistant", help="Only this assistant's.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def jobs_list(assistant: str | None, as_json: bool) -> None:
    """Jobs, newest first."""
    from finetune_assets.overview import job_rows

    rows = job_rows(Environment.read(), assistant)
    if as_json:
        print(json.dumps({"jobs": rows}, default=str))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("job", "assistant", "trainer", "status", "created", "took", "tokens", "version"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        took = f"{row['seconds']:.0f} s" if row["seconds"] is not None else "-"
        cells = [row["id"], row["assistant"], row["provider"], row["status"], f"{row['created_at']:%Y-%m-%d %H:%M}", took]
        table.add_row(*cells, str(row["trained_tokens"] or "-"), row["fine_tuned_model"] or "-")
    _wide().print(table)


@jobs.command("show")
@click.argument("job_id")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def jobs_show(job_id: str, as_json: bool) -> None:
    """One job: settings, plan, progress, result."""
    from finetune_assets.overview import job_detail

    detail = job_detail(Environment.read(), job_id)
    if as_json:
        print(json.dumps(detail, default=str))
        return
    for key, value in detail.items():
        text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else value
        click.echo(f"{key:<20} {text}")


@jobs.command("events")
@click.argument("job_id")
def jobs_events(job_id: str) -> None:
    """Progress of a job as JSON lines."""
    from finetune_assets.overview import job_events

    for event in job_events(Environment.read(), job_id):
        print(json.dumps(event))


@jobs.command("cancel")
@click.argument("job_id")
def jobs_cancel(job_id: str) -> None:
    """Stop a job; what it has learned up to its last checkpoint stays for a later start."""
    from finetune_assets.overview import cancel_job

    click.echo(cancel_job(Environment.read(), job_id))


@main.command()
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


def _wide() -> Console:
    """A console that never cuts a table: narrower ones wrap its lines."""
    console = Console(highlight=False)
    console.width = max(console.width, 130)
    return console


@contextmanager
def _quiet(home: Path) -> Generator[tuple[TextIO, TextIO]]:
    """Sends what libraries print to `<home>/finetune.log`; yields the real stderr and stdout."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"FINETUNE_HOME={home} cannot be made: {error}. Name a folder that is writable.") from None
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(2), os.dup(1)
    log = os.open(home / "finetune.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        with os.fdopen(os.dup(2), "w", buffering=1) as terminal, os.fdopen(os.dup(1), "w", buffering=1) as output:
            os.dup2(log, 2)
            os.dup2(log, 1)
            yield terminal, output
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 2)
        os.dup2(kept[1], 1)
        for descriptor in (*kept, log):
            os.close(descriptor)


if __name__ == "__main__":
    main()
