"""Checkpoints that are whole or absent: written to a temporary folder, listed with sizes and digests, renamed last.

<job>/checkpoints/checkpoint-<step>/   what transformers' Trainer writes, totals.json, and whole.json last
<job>/checkpoints/best/                weights of the lowest validation loss, best.json
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from finetune_assets.storage import TEMPORARY, read_json, write_json

WHOLE = "whole.json"


def seal(folder: Path) -> None:
    """Lists what is in the folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != WHOLE]
    write_json(folder / WHOLE, {str(file.relative_to(folder)): [file.stat().st_size, _digest(file)] for file in files})


def is_whole(folder: Path) -> bool:
    """Whether the folder was sealed and holds what was listed, unchanged."""
    try:
        listed: dict[str, list[int | str]] = read_json(folder / WHOLE)
        return all([(folder / name).stat().st_size, _digest(folder / name)] == entry for name, entry in listed.items())
    except (OSError, ValueError):
        return False


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint (None: there is none), and the newer ones that are broken."""
    broken: list[Path] = []
    for checkpoint in reversed(listed(folder)):
        if is_whole(checkpoint):
            return checkpoint, broken
        broken.append(checkpoint)
    return None, broken


def listed(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(
        (path for path in folder.glob("checkpoint-*") if step_of(path) is not None), key=lambda path: step_of(path) or 0
    )


def step_of(checkpoint: Path) -> int | None:
    """The optimiser step in the folder's name."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match.group(1)) if match else None


def prune(folder: Path, kept: int) -> None:
    """Deletes all but the newest `kept` checkpoints, and what interrupted writes left behind."""
    for checkpoint in listed(folder)[:-kept]:
        shutil.rmtree(checkpoint)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
