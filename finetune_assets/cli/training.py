"""`finetune reproduce` and `finetune models export`: a version made again, and handed to an app."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune_assets.environment import Environment
from finetune_assets.errors import LaunchError, LedgerError

if TYPE_CHECKING:
    from finetune_assets.registry import Version


def find_version(environment: Environment, version: str, assistant: str | None) -> Version:
    """The version of that name. Raises LedgerError where there is none, or several assistants have one."""
    from finetune_assets.registry import Ledger

    ledger = Ledger(environment.database_url)
    try:
        found = [one for one in ledger.versions(assistant) if one.version == version]
    finally:
        ledger.close()
    if len(found) != 1:
        known = ", ".join(sorted(one.assistant for one in found))
        raise LedgerError(
            f"There is no version {version!r}; `finetune status` shows the newest ones."
            if not found
            else f"{version} is a version of {known}; say which with --assistant."
        )
    return found[0]


@click.command()
@click.argument("version")
@click.option("--assistant", help="Needed only where two assistants have a version of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def reproduce(version: str, assistant: str | None, as_json: bool) -> None:
    """Train a version again from the spec it keeps, and compare. Ends with 1 where the weights are others."""
    from finetune_assets.storage import Store
    from finetune_assets.training.reproduce import reproduce as train_again

    environment = Environment.read()
    made = train_again(Store(environment.home), find_version(environment, version, assistant), _launch)
    if as_json:
        print(json.dumps({**vars(made), "folder": str(made.folder)}))
    else:
        click.echo(f"{version}: {'identical weights and curve' if made.identical else 'other weights'}, in {made.folder}")
        if not made.identical:
            click.echo(f"Largest difference of a loss: {made.farthest:.3g}")
        for key, (then, now) in made.changed.items():
            click.echo(f"{key}: then {then}, now {now}")
    sys.exit(0 if made.identical else 1)


def _launch(spec_file: Path, output: Path) -> None:
    """Runs the worker; its progress is on this terminal."""
    environment = {**os.environ, "FINETUNE_DIE_WITH_PARENT": str(os.getpid())}
    command = [sys.executable, "-m", "finetune_assets.worker", str(spec_file)]
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        error = output / "error.json"
        raise LaunchError(
            json.loads(error.read_text())["message"] if error.exists() else "The training was killed; start it again."
        )


@click.command("export")
@click.argument("version")
@click.option("--assistant", help="Needed only where two assistants have a version of that name.")
@click.option("--to", "folder", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option("--adapter", is_flag=True, help="The adapter alone, without its base.")
def export(version: str, assistant: str | None, folder: Path, adapter: bool) -> None:
    """Copy a version to a folder that any server of Hugging Face models loads; prints the line for an app's settings."""
    from finetune_assets.training.reproduce import export as copy

    print(f"MODEL_NAME={copy(find_version(Environment.read(), version, assistant), folder, adapter=adapter)}")


COMMANDS: list[click.Command] = [reproduce]
