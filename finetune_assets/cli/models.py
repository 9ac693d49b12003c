"""`finetune models …` and `finetune chat`: model versions."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from finetune_assets.cli import training
from finetune_assets.environment import Environment


@click.group()
def models() -> None:
    """Model versions."""


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


@models.command("list")
@click.option("--assistant", help="Only this assistant's.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def models_list(assistant: str | None, as_json: bool) -> None:
    """Versions, newest first, with their verdict and what they do now."""
    from rich.table import Table

    from finetune_assets.cli.console import VERDICTS, wide
    from finetune_assets.registry import Ledger

    ledger = Ledger(Environment.read().database_url)
    states = {state.assistant: state for state in ledger.rollouts()}
    rows: list[dict[str, Any]] = []
    for version in ledger.versions(assistant):
        state = states.get(version.assistant)
        role = ""
        if state is not None and version.version == state.champion:
            role = "champion"
        elif state is not None and version.version == state.candidate:
            role = f"candidate, {state.step}"
        rows.append({**vars(version), "role": role})
    ledger.close()
    if as_json:
        print(json.dumps({"versions": rows}, default=str))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("assistant", "version", "verdict", "now", "data set", "base model", "made"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        made = f"{row['created_at']:%Y-%m-%d %H:%M}"
        cells = [row["assistant"], row["version"], VERDICTS.get(row["verdict"], "-"), row["role"] or "-"]
        table.add_row(*cells, row["dataset_fingerprint"][:10], row["base_model"], made)
    wide().print(table)


def _facts(assistant: str, *versions: str) -> list[dict[str, Any]]:
    from finetune_assets.registry import Ledger
    from finetune_assets.registry.compare import facts

    ledger = Ledger(Environment.read().database_url)
    try:
        return [facts(ledger, ledger.version(assistant, version)) for version in versions]
    finally:
        ledger.close()


@models.command("show")
@click.argument("assistant")
@click.argument("version")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def models_show(assistant: str, version: str, as_json: bool) -> None:
    """One version: data set, settings, measures, places."""
    row = _facts(assistant, version)[0]
    if as_json:
        print(json.dumps(row, default=str))
        return
    for key, value in row.items():
        click.echo(f"{key:<32} {value}")


@models.command("diff")
@click.argument("assistant")
@click.argument("first")
@click.argument("second")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def models_diff(assistant: str, first: str, second: str, as_json: bool) -> None:
    """Everything in which two versions differ."""
    from finetune_assets.registry.compare import differences

    rows = differences(*_facts(assistant, first, second))
    if as_json:
        print(json.dumps({name: [a, b] for name, a, b in rows}, default=str))
        return
    for name, a, b in rows:
        click.echo(f"{name:<32} {a!s:<28} {b}")


COMMANDS: list[click.Command] = [chat, models]
