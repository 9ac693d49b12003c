"""`finetune …`: the command line. It launches the same Dagster jobs as the UI and reads the same ledger.

Exit codes: 0 done, whatever the verdict; 1 a failure; 2 a usage error; 3 `--require serve` and another verdict.
`--json` prints one object on stdout; progress goes to stderr. A command imports what it needs when it runs, so that `--help`
answers at once. A module of this folder is a theme, and lists its commands in COMMANDS.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import click

from finetune_assets import __version__
from finetune_assets.cli import data, evaluation, imports, jobs, models, privacy, remote, run, serving, settings, training
from finetune_assets.environment import ROOT
from finetune_assets.errors import FinetuneError


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


for theme in (run, jobs, models, data, privacy, imports, remote, evaluation, serving, settings, training):
    for command in theme.COMMANDS:
        main.add_command(command)
