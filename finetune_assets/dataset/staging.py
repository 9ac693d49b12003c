"""Keeps a choice between two steps, until it is frozen: <home>/datasets/<assistant>/staged/*.parquet and notes.json."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from itertools import accumulate
from pathlib import Path

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.dataset.build import Choice
from finetune_assets.dataset.manifest import CODE_VERSION, data_settings
from finetune_assets.dataset.reading import read_more
from finetune_assets.errors import DataError
from finetune_assets.storage import Store, read_json, replacing_folder, write_json, write_parquet

_FRAMES = ("dropped", "preferences", "kto", "feedback_seen")


def _settings_key(assistant: Assistant) -> str:
    settings = {
        "code_version": CODE_VERSION,
        "min_examples": assistant.min_examples,
        "minimum": assistant.minimum.model_dump(mode="json"),
        **data_settings(assistant),
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def stage(store: Store, assistant: Assistant, choice: Choice) -> Path:
    """Keeps the choice until it is frozen; one that was staged before is replaced."""
    folder = store.datasets(assistant.name) / "staged"
    with replacing_folder(folder) as draft:
        for number, rows in enumerate(choice.contexts(choice.kept)):
            write_parquet(draft / f"kept-{number:05}.parquet", rows)
        for name in _FRAMES:
            write_parquet(draft / f"{name}.parquet", getattr(choice, name))
        write_json(draft / "notes.json", {"settings_key": _settings_key(assistant), "notes": choice.notes})
    return folder


def load_staged(store: Store, assistant: Assistant) -> Choice:
    """The staged choice. Raises DataError where there is none, or one of other settings."""
    folder = store.datasets(assistant.name) / "staged"
    if not (folder / "notes.json").exists():
        raise DataError(
            f"Assistant {assistant.name!r} has no staged examples in {folder}. Materialise the asset training_examples."
        )
    stored = read_json(folder / "notes.json")
    files = sorted(folder.glob("kept-*.parquet"))
    if stored["settings_key"] != _settings_key(assistant) or not files:
        raise DataError(
            f"The staged examples of assistant {assistant.name!r} in {folder} were chosen with other settings or by older code. "
            "Materialise the asset training_examples again."
        )
    parts = [pl.scan_parquet(file).drop("context", "place").collect() for file in files]
    starts = [0, *accumulate(part.height for part in parts)]
    return Choice(
        kept=pl.concat(parts).with_row_index("place"),
        **{name: pl.read_parquet(folder / f"{name}.parquet") for name in _FRAMES},
        notes=stored["notes"],
        contexts=partial(read_more, files, starts),
    )
