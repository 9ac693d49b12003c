"""Shows on the terminal what a child process reports while it works."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
from rich.console import Console

from finetune_assets.resources import LauncherResource

PLAIN_SECONDS = 10
"""Seconds between progress lines where the output is no terminal."""


class TerminalLauncher(LauncherResource):
    """The launcher of `finetune run`: the same child process, its progress on the terminal."""

    console: ClassVar[Console | None] = None  # of the class, since Dagster copies a resource by its fields

    @classmethod
    def showing(cls, console: Console) -> TerminalLauncher:
        """The launcher of a process whose progress goes to this console."""
        cls.console = console
        return cls()

    def run(self, context: dg.AssetExecutionContext, spec_file: Path, output: Path) -> None:
        """Runs the child and shows the last line of its `progress.jsonl` until it ends."""
        console = self.console
        if console is None:
            super().run(context, spec_file, output)
            return
        file = output / "progress.jsonl"
        start = file.stat().st_size if file.exists() else 0
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(console, file, start, done), daemon=True)
        watcher.start()
        try:
            super().run(context, spec_file, output)
        finally:
            done.set()
            watcher.join(timeout=5)


def _watch(console: Console, file: Path, start: int, done: threading.Event) -> None:
    shown, last, pending = "", 0.0, False
    with console.status("starting") if console.is_terminal else _Nothing() as status:
        while True:
            ended = done.wait(0.5)
            line = _last_line(file, start)
            if line and line != shown:
                shown, pending = line, True
                text = describe(json.loads(line))
                if status is not None:
                    status.update(text)
                elif time.monotonic() - last >= PLAIN_SECONDS:
                    console.print(text, markup=False)
                    last, pending = time.monotonic(), False
            if ended:
                break
    if pending:
        console.print(describe(json.loads(shown)), markup=False)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _last_line(file: Path, start: int) -> str:
    """The last whole line that was written after byte `start`."""
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        stream.seek(start)
        whole = stream.read().rpartition(b"\n")[0]
    return whole.rpartition(b"\n")[2].decode(errors="replace")


def describe(event: dict[str, Any]) -> str:
    """One progress event as a line: a note, or stage, step, loss, tokens a second, time left."""
    if "note" in event:
        return str(event["note"])
    parts = [f"{event.get('stage', 'working')} {event.get('step', 0)}/{event.get('total', '?')}"]
    if isinstance(event.get("loss"), (int, float)):
        parts.append(f"loss {event['loss']:.3f}")
    if isinstance(event.get("eval_loss"), (int, float)):
        parts.append(f"validation loss {event['eval_loss']:.3f}")
    if isinstance(event.get("tokens_per_second"), (int, float)):
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if isinstance(event.get("seconds_left"), (int, float)):
        minutes, seconds = divmod(int(event["seconds_left"]), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)
