"""`finetune models …` and `finetune chat`: model versions."""

from __future__ import annotations

import sys

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


COMMANDS: list[click.Command] = [chat, models]
