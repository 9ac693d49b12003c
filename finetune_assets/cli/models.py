"""`finetune models …`: the registry; `finetune chat`: talking to a model version."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from finetune_assets.cli import training
from finetune_assets.environment import Environment

if TYPE_CHECKING:
    from finetune_assets.registry import Ledger


@click.group()
def models() -> None:
    """Model versions: what there is, one in full, two side by side, and taking one out."""


models.add_command(training.export)


@click.command()
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
            while called := session.called:  # the person at the terminal stands in for the tools
                print(session.results([input(f"{name} gives: ") for name in called]), flush=True)


@models.command("list")
@click.option("--assistant", help="Only this assistant's.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def models_list(assistant: str | None, as_json: bool) -> None:
    """Versions, newest first, with their verdict and what they do now."""
    from rich.table import Table

    from finetune_assets.cli.console import VERDICTS, wide

    with _ledger() as ledger:
        roles = _roles(ledger)
        rows = [{**vars(one), "role": roles.get((one.assistant, one.version), "")} for one in ledger.versions(assistant)]
    if as_json:
        print(json.dumps({"versions": rows}, default=str))
        return
    if not rows:
        name = assistant or "NAME"
        click.echo(f"{assistant or 'No assistant'} has no version yet; one is made by: finetune run --assistant {name}")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("assistant", "version", "verdict", "now", "data set", "base model", "made"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        made = f"{row['created_at']:%Y-%m-%d %H:%M}"
        cells = [row["assistant"], row["version"], VERDICTS.get(row["verdict"], "-"), row["role"] or "-"]
        table.add_row(*cells, row["dataset_fingerprint"][:10], row["base_model"], made)
    wide().print(table)


@contextmanager
def _ledger() -> Generator[Ledger]:
    from finetune_assets.registry import Ledger

    ledger = Ledger(Environment.read().database_url)
    try:
        yield ledger
    finally:
        ledger.close()


def _roles(ledger: Ledger) -> dict[tuple[str, str], str]:
    """What versions do now, by assistant and version."""
    roles: dict[tuple[str, str], str] = {}
    for state in ledger.rollouts():
        if state.champion:
            roles[state.assistant, state.champion] = "champion"
        if state.candidate:
            at = "shadow" if state.step == "shadow" else f"{state.step} %"
            roles[state.assistant, state.candidate] = f"candidate, {at}"
    return roles


@models.command("show")
@click.argument("assistant")
@click.argument("version")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def models_show(assistant: str, version: str, as_json: bool) -> None:
    """One version: verdict and why, what it was made of and how, its measures beside the base model's, its history."""
    from finetune_assets.registry.compare import facts, measures

    with _ledger() as ledger:
        found = ledger.version(assistant, version)
        row, role = facts(ledger, found), _roles(ledger).get((assistant, version), "")
        events = [event for event in ledger.events(assistant) if event["version"] == version]
    if as_json:
        print(json.dumps(row, default=str))
        return
    click.secho(
        f"{assistant} {version}: {(found.verdict or 'not benchmarked').replace('_', ' ')}{', ' + role if role else ''}", bold=True
    )
    for reason in found.reasons or []:
        click.echo(f"  {reason}")
    how = [row["created_at"], row["trainer"], f"from {row['base_model']}"]
    how += [f"{row['trained_tokens']:,} tokens"] if row["trained_tokens"] else []
    how += [f"{row['seconds']:.0f} s"] if row["seconds"] is not None else []
    click.echo(f"\nmade      {', '.join(how)}")
    click.echo(f"data set  {row['dataset']}: {_listed(row, 'rows.')}")
    for name in ("source", "intent"):
        if any(key.startswith(f"{name}.") for key in row):
            click.echo(f"{name + 's':<9} {_listed(row, f'{name}.')}")
    click.echo(f"settings  {_listed(row, 'hyperparameters.', value_first=False)}")
    click.echo(f"content   {row['content_hash']}\nfolder    {row['folder']}\nreport    {row['report'] or '-'}\n")
    _print_measures({"tuned": measures(found).get("tuned", {}), "base": measures(found).get("base", {})})
    click.echo()
    for event in events:
        what = f"{event['created_at']:%Y-%m-%d %H:%M} {event['event'].replace('_', ' ')}"
        click.echo(
            f"{what}{' to ' + event['step'] if event['event'] == 'advanced' else ''}: {event['reason']} ({event['actor']})"
        )


def _listed(row: dict[str, Any], prefix: str, *, value_first: bool = True) -> str:
    found = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
    return ", ".join(f"{value:,} {name}" if value_first else f"{name} {value}" for name, value in found.items()) or "-"


def _number(value: Any) -> str:
    """Four figures of a measure, whole numbers whole."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if value.is_integer() or abs(value) >= 10_000 else f"{value:.4g}"


def _interval(one: dict[str, float | None] | None) -> str:
    if one is None:
        return "-"
    ends = [one.get("low"), one.get("high")]
    return _number(one["value"]) + ("" if None in ends or ends[0] == ends[1] else f" [{_number(ends[0])}, {_number(ends[1])}]")


def _print_measures(columns: Mapping[str, Mapping[str, dict[str, float | None]]]) -> None:
    """A row a measure with its 95 % interval, a column a candidate or version."""
    from rich.table import Table

    from finetune_assets.cli.console import wide

    names = sorted({name for found in columns.values() for name in found})
    if not names:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("measure", *columns):
        table.add_column(column, no_wrap=True)
    for name in names:
        table.add_row(name, *(_interval(found.get(name)) for found in columns.values()))
    wide().print(table)


@models.command("diff")
@click.argument("assistant")
@click.argument("first")
@click.argument("second")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def models_diff(assistant: str, first: str, second: str, as_json: bool) -> None:
    """Everything in which two versions differ: data, settings, measures with their intervals."""
    from rich.table import Table

    from finetune_assets.cli.console import wide
    from finetune_assets.registry.compare import differences, facts, measures

    with _ledger() as ledger:
        versions = [ledger.version(assistant, name) for name in (first, second)]
        rows = differences(*(facts(ledger, one) for one in versions))
    if as_json:
        print(json.dumps({name: [a, b] for name, a, b in rows}, default=str))
        return
    found = [measures(one).get("tuned", {}) for one in versions]
    table = Table(box=None, pad_edge=False)
    for column in ("", first, second, "change"):
        table.add_column(column, no_wrap=column != "")
    for name, a, b in rows:
        measure = name.removeprefix("tuned.")
        shown = [_interval(one.get(measure)) for one in found] if name != measure else [_number(a), _number(b)]
        change = f"{b - a:+.4g}" if isinstance(a, (int, float)) and isinstance(b, (int, float)) else ""
        if name not in ("version", "folder", "report", "content_hash"):  # they always differ
            table.add_row(name, *shown, change)
    if table.row_count:
        wide().print(table)
    else:
        click.echo(f"{first} and {second} differ in nothing but their content.")


COMMANDS: list[click.Command] = [chat, models]
