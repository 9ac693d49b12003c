"""`finetune jobs …`: training jobs, local and remote."""

from __future__ import annotations

import json

import click
from rich.table import Table

from finetune_assets.cli.console import wide
from finetune_assets.environment import Environment


@click.group()
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
    wide().print(table)


@jobs.command("show")
@click.argument("job_id")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def jobs_show(job_id: str, as_json: bool) -> None:
    """One job: settings, plan, progress, result."""
    from finetune_assets.overview import job_detail
    from finetune_assets.registry.tables import OPEN_STATUSES

    detail = job_detail(Environment.read(), job_id)
    if as_json:
        print(json.dumps(detail, default=str))
        return
    progress = detail.get("progress") or {}
    if detail["status"] in OPEN_STATUSES and isinstance(progress.get("seconds_left"), int | float):
        minutes, seconds = divmod(round(progress["seconds_left"]), 60)
        step = f"{progress.get('stage')} {progress.get('step'):,} of {progress.get('total'):,}"
        click.echo(f"{'time left':<20} {minutes}:{seconds:02d} for {step}")
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
@click.option(
    "--ended", is_flag=True, help="Of a job that its provider cannot tell of: you have seen there that it runs no more."
)
def jobs_cancel(job_id: str, ended: bool) -> None:
    """Stop a job, here or at its provider; a local one keeps its last checkpoint for a later start."""
    from finetune_assets.overview import cancel_job

    click.echo(cancel_job(Environment.read(), job_id, ended))


@jobs.command("pause")
@click.argument("job_id")
def jobs_pause(job_id: str) -> None:
    """Hold a remote job, where its provider can."""
    from finetune_assets.overview import hold_job

    click.echo(f"{job_id}: {hold_job(Environment.read(), job_id, pause=True).provider_status}")


@jobs.command("resume")
@click.argument("job_id")
def jobs_resume(job_id: str) -> None:
    """Let a held remote job go on."""
    from finetune_assets.overview import hold_job

    click.echo(f"{job_id}: {hold_job(Environment.read(), job_id, pause=False).provider_status}")


COMMANDS: list[click.Command] = [jobs]
