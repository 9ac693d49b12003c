"""How commands print: wide tables, and libraries that keep quiet."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console

from finetune_assets.errors import SettingsError

VERDICTS = {
    "serve": "[green]serve[/]",
    "do_not_serve": "[red]do not serve[/]",
    "cannot_tell": "[yellow]cannot tell[/]",
    None: "-",
}


def wide() -> Console:
    """A console that never cuts a table: narrower ones wrap its lines."""
    console = Console(highlight=False)
    console.width = max(console.width, 130)
    return console


@contextmanager
def quiet(home: Path) -> Generator[tuple[TextIO, TextIO]]:
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
