"""training_log.jsonl: points of the curve and recoveries, one JSON object a line; half a line that a kill left is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_assets.storage import write_text


def append(file: Path, text: str) -> None:
    """Appends lines, wholly or not at all; half a line that a kill left before them stays by itself. Raises OSError."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with file.open("ab+") as stream:
            if size:
                stream.seek(-1, 2)
                if stream.read(1) != b"\n":
                    text = "\n" + text
            stream.write(text.encode())
    except OSError:
        if file.exists():
            with file.open("r+b") as stream:
                stream.truncate(size)
        raise


def read(file: Path) -> list[dict[str, Any]]:
    """The entries, without lines that are not whole; none where there is no file."""
    entries: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # it was being written when the process was killed
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries


def truncate(file: Path, step: int) -> None:
    """Drops points after `step`: they will be written again. Recoveries stay."""
    kept = [entry for entry in read(file) if entry["step"] <= step or "recovery" in entry]
    write_text(file, "".join(json.dumps(entry) + "\n" for entry in kept))
