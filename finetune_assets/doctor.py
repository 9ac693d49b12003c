"""What works here, what does not, and what to do about it: `finetune doctor`. Looks only; imports no model library."""

from __future__ import annotations

import datetime
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from finetune_assets.assistants import assistant_names, load_assistant
from finetune_assets.corpus.sources import read_source
from finetune_assets.environment import ROOT, Environment
from finetune_assets.errors import FinetuneError
from finetune_assets.findings import Finding, Level
from finetune_assets.registry import Ledger
from finetune_assets.rented import rented
from finetune_assets.storage import Store, read_json
from finetune_assets.training import machine

GIB = 2**30


def examine(environment: Environment, as_of: datetime.date | None = None) -> list[Finding]:
    """All findings, in the order in which a new user needs them. `as_of`: the day by which models' last days are seen."""
    findings = [*_machine(), _disk(environment.home)]
    parts: list[tuple[str, Callable[[Environment], list[Finding]]]] = [
        ("ledger", _ledger),
        ("source", _source),
        ("assistants", _assistants),
        ("rented trainers", lambda environment: rented(environment, as_of)),
    ]
    for what, part in parts:
        try:
            findings += part(environment)
        except FinetuneError as error:
            findings.append(Finding("problem", what, str(error)))
    return findings


def _machine() -> list[Finding]:
    memory, gpus = machine.total_memory() / GIB, machine.gpus()
    findings = [Finding("ok" if memory >= 4 else "warning", "machine", f"{machine.cores()} cores, {memory:.0f} GiB of memory")]
    text = f"{gpus} NVIDIA GPU(s)" if gpus else "no NVIDIA GPU: fine for the small base model, slow above about 100M parameters"
    findings.append(Finding("ok" if gpus else "warning", "gpu", text))
    missing = [
        name for name in ("torch", "transformers", "trl", "sentence_transformers") if importlib.util.find_spec(name) is None
    ]
    if missing:
        findings.append(Finding("problem", "packages", f"missing: {', '.join(missing)}; run `make install`"))
    return findings


def _disk(home: Path) -> Finding:
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    level: Level = "problem" if free < 0.5 else "warning" if free < 5 else "ok"
    if not os.access(existing, os.W_OK):
        return Finding("problem", "disk", f"{existing} is not writable; set FINETUNE_HOME to a folder that is")
    return Finding(
        level, "disk", f"{free:.1f} GiB free for {home}" + ("; make room or move FINETUNE_HOME" if level != "ok" else "")
    )


def _ledger(environment: Environment) -> list[Finding]:
    ledger = Ledger(environment.database_url)
    try:
        jobs, versions = len(ledger.jobs()), len(ledger.versions())
    finally:
        ledger.close()
    return [
        Finding("ok", "ledger", f"{ledger.engine.url.render_as_string(hide_password=True)}: {jobs} jobs, {versions} versions")
    ]


def _source(environment: Environment) -> list[Finding]:
    tables = read_source(environment.sources)
    counts = (
        f"{tables.conversations.height:,} conversations, {tables.messages.height:,} messages, {tables.feedback.height:,} feedback"
    )
    findings = [Finding("ok", "source", f"{', '.join(_shown(source) for source in environment.sources)}: {counts}")]
    unknown = {table: columns for table, columns in tables.unknown_columns.items() if columns}
    if unknown:
        text = "; ".join(f"{table}: {', '.join(columns)}" for table, columns in unknown.items())
        findings.append(Finding("warning", "source", f"columns that are not read: {text}"))
    return findings


def _shown(source: str) -> str:
    """A source without the user and password of its URL."""
    scheme, separator, rest = source.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if separator else source


def _assistants(environment: Environment) -> list[Finding]:
    store = Store(environment.home)
    tenants = read_json(store.tenants) if store.tenants.exists() else {}
    findings: list[Finding] = []
    names = assistant_names(environment.assistants)
    if not names:
        findings.append(Finding("warning", "assistants", f"{environment.assistants} holds no YAML file; add one with a `select`"))
    for name in names:
        try:
            findings.append(_assistant(environment, store, name, tenants))
        except FinetuneError as error:
            findings.append(Finding("problem", name, str(error)))
    return findings


def _assistant(environment: Environment, store: Store, name: str, tenants: dict[str, str]) -> Finding:
    settings = load_assistant(environment.assistants, name, tenants)
    model = Path(settings.base_model) if Path(settings.base_model).is_absolute() else ROOT / settings.base_model
    local = (model / "config.json").exists()
    manifest = store.datasets(name) / "latest" / "manifest.json"
    rows = read_json(manifest)["counts"]["split"] if manifest.exists() else None
    volume = f"{rows['train']} train / {rows['test']} test rows" if rows else "no data set yet"
    if settings.trainer != "local":
        rows_known = f"{rows['train']} train / {rows['test']} test rows" if rows else "no data set yet"
        return Finding("ok", name, f"{settings.base_model} at {settings.trainer}, {'+'.join(settings.objective)}; {rows_known}")
    text = f"{settings.base_model} ({settings.trainer}, {'+'.join(settings.objective)}, {settings.adapter}); {volume}"
    if local:
        return Finding("ok", name, text)
    if model.exists() or settings.base_model.startswith((".", "/", "data/")):
        return Finding("problem", name, f"{text}; {model} holds no model (no config.json): correct `base_model`")
    return Finding("warning", name, f"{text}; comes from the Hugging Face hub at the first training unless it is in the cache")
