"""The manifest of a frozen data set, its fingerprint, and which feedback it has seen.

The fingerprint is a hash of the sorted lines (each with its file and source), the settings that shape data, and the version of
this code; no path, time, source address or id is in it, so the same content has the same fingerprint on every machine.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.dataset.formats import FILES
from finetune_assets.dataset.reading import scan
from finetune_assets.dataset.selection import tenants_of
from finetune_assets.errors import DataError
from finetune_assets.storage import Store, read_json, write_parquet

Manifest = dict[str, Any]
TOMBSTONE = "tombstone.json"
CODE_VERSION = "2"
"""Of the rules in this package; a change that may choose, cut or write other rows raises it."""
DATA_SETTINGS = {"select", "system_prompt", "rows", "window_weeks", "filters", "split", "balance", "augment"}


def data_settings(assistant: Assistant) -> dict[str, Any]:
    """The settings that decide what is in the data set, as JSON; the others (model, trainer, gates, …) do not change it."""
    settings = assistant.model_dump(mode="json", include=DATA_SETTINGS)
    settings["filters"]["exclude_tenants"] = sorted(settings["filters"]["exclude_tenants"])
    if assistant.tools:  # a data set without tools keeps the fingerprint that it had before there were any
        settings["tools"] = assistant.tools
    if llm := assistant.augment.llm:  # what it said is in the rows; where it runs and what it may cost is not
        settings["augment"]["llm"] = {"model": llm.model}
    return settings


def fingerprint(settings: dict[str, Any], frames: dict[str, pl.DataFrame]) -> str:
    """20 hex digits; `frames` maps kind to rows with split, source and digest."""
    state = hashlib.blake2b(digest_size=10)
    head = {"code_version": CODE_VERSION, "settings": settings}
    state.update(json.dumps(head, sort_keys=True, ensure_ascii=False).encode())
    for spec in FILES:
        rows = frames[spec.kind].filter(pl.col("split").is_in(spec.splits))
        for (split, source), own in sorted(rows.group_by("split", "source"), key=itemgetter(0)):
            line = pl.concat_str(pl.lit(f"{spec.name}\t{split}\t{source}\t"), "digest", pl.lit("\n"))
            for part in own.select(pl.col("digest").sort()).iter_slices(50_000):
                state.update(part.select(line.str.join()).item().encode())
    return state.hexdigest()


def counts(kept: pl.DataFrame) -> dict[str, Any]:
    """Examples in total, and by split, source, intent and tenant."""
    intents = kept.select("intent", "split").group_by("intent")
    return {
        "examples": kept.height,
        "split": tally(kept["split"]),
        "source": tally(kept["source"]),
        "intent": tally(kept["intent"]),
        "tenant": tally(kept["tenant_id"]),
        "intent_by_split": {str(intent): tally(part["split"]) for (intent,), part in sorted(intents, key=lambda g: str(g[0][0]))},
    }


def tally(values: pl.Series) -> dict[str, int]:
    """How often each value occurs, most frequent first."""
    counted = values.value_counts(name="n").rows()
    return {str(value): int(n) for value, n in sorted(counted, key=lambda pair: (-pair[1], str(pair[0])))}


def make_manifest(assistant: Assistant, made: dict[str, Any]) -> Manifest:
    """`made`: fingerprint, weeks, counts, rejected, feedback, pairs, warnings, leaks, parents."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        **made,
        "assistant": assistant.name,
        "settings": data_settings(assistant),
        "code_version": CODE_VERSION,
        "created_at": now,
    }


def latest(store: Store, assistant: str) -> Path | None:
    """The folder of the assistant's newest frozen data set, or None."""
    link = store.datasets(assistant) / "latest"
    return link.resolve() if (link / "manifest.json").exists() else None


def read_tombstone(folder: Path) -> dict[str, Any] | None:
    """What stands in the place of a data set that was rewritten: fingerprint, rewritten_as (or null), erased_at; else None."""
    path = folder / TOMBSTONE
    return read_json(path) if path.exists() else None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a frozen data set. Raises DataError for one that was rewritten because a person was erased from it."""
    tombstone = read_tombstone(folder)
    if tombstone is not None:
        then = tombstone["rewritten_as"]
        rest = f"what is left of it is {then}" if then else "nothing was left of it"
        raise DataError(
            f"Data set {folder.name} is gone: a person was erased from it on {tombstone['erased_at'][:10]}, and {rest}. "
            "What was trained on it cannot be made again; train on the newest data set instead."
        )
    manifest: Manifest = read_json(folder / "manifest.json")
    return manifest


def standing(store: Store, assistant: str, fingerprint: str) -> Path:
    """The folder of a data set, or of what took its place when people were erased. Raises DataError where neither is left."""
    folder = store.dataset(assistant, fingerprint)
    for _ in range(1_000):
        tombstone = read_tombstone(folder)
        if tombstone is None or tombstone["rewritten_as"] is None:
            break
        folder = store.dataset(assistant, tombstone["rewritten_as"])
    if read_tombstone(folder) is not None:
        read_manifest(folder)  # raises: nothing was left
    if not (folder / "manifest.json").exists():
        raise DataError(f"Data set {fingerprint} of {assistant} is not in {folder.parent}; materialise jsonl_splits again.")
    return folder


def seen_file(store: Store, assistant: str, fingerprint: str) -> Path:
    """Ids of all feedback that had come in when this data set was last made; beside the frozen folder, which never changes."""
    return store.datasets(assistant) / "feedback_seen" / f"{fingerprint}.parquet"


def write_seen(store: Store, assistant: str, fingerprint: str, feedback_ids: pl.Series) -> None:
    """Keeps the ids. Feedback that changed nothing leaves the fingerprint as it is, and is seen all the same."""
    write_parquet(seen_file(store, assistant, fingerprint), feedback_ids.unique().sort().to_frame("feedback_id"))


def new_feedback(store: Store, assistant: Assistant, fingerprint: str | None) -> int:
    """How many feedback rows of the assistant's tenants the data set of this fingerprint has not seen; None: all of them."""
    weeks = store.weeks("feedback")
    rows = scan(store, "feedback", weeks)
    if rows is None:
        return 0
    ids = rows.filter(pl.col("tenant_id").is_in(tenants_of(store, assistant))).select("feedback_id")
    if fingerprint and (path := seen_file(store, assistant.name, fingerprint)).exists():
        ids = ids.join(pl.scan_parquet(path), on="feedback_id", how="anti")
    return int(ids.select(pl.col("feedback_id").n_unique()).collect().item())
