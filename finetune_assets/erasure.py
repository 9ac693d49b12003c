"""`finetune erase`: everything of one person leaves the store, and what was trained on it is marked.

    plan = look(store, ledger, subject, key)          what there is; changes nothing
    erase(store, ledger, plan, key, forget_history)   removes it; safe to be killed anywhere and started again

First the ledger says who is to be forgotten, from when on no build reads their rows. Then everything that was made from the
corpus is cleaned, then the corpus, whose rows say what to look for; the request is completed last, after a second look found
nothing. Weights cannot be cleaned: versions trained on the rows stay, are marked, and their assistants are due for a retrain.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import polars as pl

from finetune_assets.corpus.erasure import (
    Traces,
    conversation_subject,
    conversation_subjects,
    find_traces,
    hashed_id,
    key_check,
    left_over,
    take_out,
    user_subject,
)
from finetune_assets.dataset.erasure import buried, drop_staged, finish, frozen_folders, lineages, names, rewrite, rows_of
from finetune_assets.dataset.manifest import read_manifest
from finetune_assets.errors import DataError
from finetune_assets.evaluation.report import write_report
from finetune_assets.registry import Ledger, erasures
from finetune_assets.storage import Store, read_json, sweep, write_json, write_parquet, write_text

SHORTEST = 16
"""Characters from which a text is looked for by itself: shorter ones ("Sí, gracias") are not one person's."""
DRAFT_SECONDS = 600.0
TEXT_FILES = {".json", ".jsonl", ".md", ".html", ".txt", ".csv", ".parquet"}
ELSEWHERE = ("corpus", "datasets", "dagster")
"""Folders of the store that are cleaned row by row, each in its own way; all others are searched file by file."""


@dataclass(frozen=True)
class Needles:
    """What to look for where rows have no columns: ids, and texts that are long enough to be one person's."""

    ids: frozenset[str]
    texts: frozenset[str] = field(repr=False)
    ERASED: ClassVar[str] = "[erased]"

    @classmethod
    def of(cls, traces: Traces) -> Needles:
        """The needles of a subject."""
        texts = frozenset(text.strip() for text in traces.texts if len(text.strip()) >= SHORTEST)
        return cls(traces.ids | {traces.subject}, texts)

    def __bool__(self) -> bool:
        return bool(self.texts) or len(self.ids) > 1

    @property
    def anything(self) -> frozenset[str]:
        """Ids, and the beginnings of the texts: cells on asset pages are cut."""
        return self.ids | {text[:60] for text in self.texts}

    def hit(self, value: Any) -> bool:
        """Whether a value is an id, holds a text, or is the cut beginning of one."""
        if not isinstance(value, str):
            return False
        cut = value[:-1] if value.endswith("…") and len(value) > SHORTEST else None
        return value in self.ids or any(text in value or (cut is not None and text.startswith(cut)) for text in self.texts)

    def replaced(self, value: str) -> str:
        """The value with every text and whole id in it replaced."""
        if value in self.ids:
            return self.ERASED
        for text in self.texts:
            value = value.replace(text, self.ERASED)
        found = [one for one in self.ids if one in value]
        for one in sorted(found, key=len, reverse=True):
            value = _whole(one).sub(self.ERASED, value)
        return value

    def inside(self, text: str) -> bool:
        """Whether a file's text holds anything, plain, as JSON or as HTML writes it."""
        ids = any(one in text and _whole(one).search(text) for one in self.ids)
        return ids or any(way in text for one in self.texts for way in _written(one))


def _whole(one: str) -> re.Pattern[str]:
    """An id that is not a part of another."""
    return re.compile(rf"(?<![\w-]){re.escape(one)}(?![\w-])")


def _written(text: str) -> set[str]:
    return {text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], html.escape(text)}


@dataclass(frozen=True)
class Plan:
    """What an erasure concerns. `datasets`: assistant, fingerprint, lines (0: it only says that theirs were dropped); `files`:
    others that hold texts or ids of theirs."""

    subject: str
    traces: Traces
    datasets: list[tuple[str, str, int]]
    versions: list[tuple[str, str]]
    open_jobs: list[str]
    remote_jobs: list[str]
    unknown: list[tuple[str, str]]
    """Versions whose data set is gone without a tombstone: nobody can tell whether they were trained on the rows."""
    files: list[Path]
    ledger_rows: dict[str, int]
    begun: bool
    """An erasure of this subject was recorded before."""

    @property
    def empty(self) -> bool:
        """Nothing of theirs is in the store."""
        return not (self.traces.conversations or self.datasets or self.files or self.ledger_rows or self.traces.rows)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON; no text, no id of a person's rows."""
        found = self.traces
        tables = ("conversations", "messages", "feedback", "examples", "rejected")
        return {
            "subject": self.subject,
            "found": not self.empty,
            "rows": {table: found.count(table) for table in tables},
            "weeks": sorted({week for weeks in found.rows.values() for week in weeks}),
            "datasets": [{"assistant": a, "fingerprint": f, "rows": n} for a, f, n in self.datasets],
            "versions": [{"assistant": a, "version": v} for a, v in self.versions],
            "cannot_tell": [{"assistant": a, "version": v} for a, v in self.unknown],
            "open_jobs": self.open_jobs,
            "remote_jobs": self.remote_jobs,
            "files": len(self.files),
            "ledger_rows": self.ledger_rows,
        }


def subject_of(user: str | None, conversation: str | None, key: bytes) -> str:
    """The subject of what was asked for; exactly one of the two is given."""
    if user is not None:
        return user_subject(user, key)
    return conversation_subject(conversation or "", key)


def look(store: Store, ledger: Ledger, subject: str, key: bytes) -> Plan:
    """What of a subject is in store and ledger; changes nothing but what an earlier erasure left unfinished."""
    finish(store)
    traces = find_traces(store, subject, key, lineages(store))
    rows = _columns(ledger, traces, key)
    talks, messages = traces.conversations | rows["conversation_id"], traces.messages | rows["message_id"]
    traces = replace(traces, conversations=talks, messages=messages)  # with chats that only the router knows
    hit = [(assistant, folder) for assistant, folder in frozen_folders(store) if names(folder, traces)]
    touched = [(assistant, folder.name, rows_of(folder, traces)) for assistant, folder in hit]
    gone = {(assistant, fingerprint) for assistant, fingerprint, rows in touched if rows}
    jobs = [job for job in ledger.jobs() if (job.assistant, job.dataset_fingerprint) in gone]
    return Plan(
        subject=subject,
        traces=traces,
        datasets=touched,
        versions=[(v.assistant, v.version) for v in ledger.versions() if (v.assistant, v.dataset_fingerprint) in gone],
        open_jobs=[job.id for job in jobs if job.status in ("pending", "running")],
        remote_jobs=[f"{job.id} ({job.provider} {job.provider_job_id})" for job in jobs if job.provider != "local"],
        unknown=[(v.assistant, v.version) for v in ledger.versions() if not _is_known(store, v.assistant, v.dataset_fingerprint)],
        files=list(_files(store, Needles.of(traces))) if Needles.of(traces) else [],
        ledger_rows=erasures.own_rows(ledger, rows, delete=False),
        begun=erasures.find(ledger, subject) is not None,
    )


def _is_known(store: Store, assistant: str, fingerprint: str) -> bool:
    folder = store.dataset(assistant, fingerprint)
    return any((folder / name).exists() for name in ("manifest.json", "tombstone.json"))


def _columns(ledger: Ledger, traces: Traces, key: bytes) -> dict[str, set[str]]:
    """What their rows hold in tables that the router writes, column by column; those have raw ids, and chats of which the corpus
    knows nothing yet."""
    users = {user for user in erasures.distinct_values(ledger, "user_id") if user_subject(user, key) == traces.subject}
    whose: dict[str, set[str]] = {"user_id": users, "user": {traces.subject}}
    talks = {
        talk
        for talk in erasures.distinct_values(ledger, "conversation_id")
        if talk in traces.conversations or traces.subject in conversation_subjects(talk, key)
    }
    whose["conversation_id"] = talks | erasures.distinct_values(ledger, "conversation_id", whose)
    whose["message_id"] = erasures.distinct_values(ledger, "message_id", whose) | traces.messages
    return {
        **whose,
        "request_id": erasures.distinct_values(ledger, "request_id", whose),
        "live_message_id": whose["message_id"],  # to which a shadow has a reply that nobody saw
    }


# --- files that are no rows


def _files(store: Store, needles: Needles) -> Iterator[Path]:
    for folder in sorted(store.home.iterdir()) if store.home.exists() else ():
        if folder.name in ELSEWHERE or folder.name.startswith("."):
            continue
        for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
            if path.parent == store.home / "serving" / "journal":
                continue  # on its way into the ledger; a router may be writing to it
            if path.suffix in TEXT_FILES and path.is_file() and not path.is_symlink() and _holds(path, needles):
                yield path


def _holds(path: Path, needles: Needles) -> bool:
    if path.suffix != ".parquet":
        return needles.inside(path.read_text(encoding="utf-8", errors="replace"))
    frame = pl.read_parquet(path)
    return any(_marked(frame[name], needles).any() for name in frame.columns if frame.schema[name] == pl.String)


def _marked(values: pl.Series, needles: Needles) -> pl.Series:
    ids = values.is_in(pl.Series(sorted(needles.ids), dtype=pl.String).implode())
    texts = values.str.contains_any(sorted(needles.texts)) if needles.texts else pl.repeat(False, len(values), eager=True)
    return (ids | texts).fill_null(False)


def _clean(store: Store, files: Iterable[Path], needles: Needles) -> None:
    """Working folders of a benchmark go whole, since their files belong together row by row; others lose what is theirs."""
    for path in files:
        if not path.exists():
            continue
        parts = path.relative_to(store.home).parts
        if parts[0] == "reports" and len(parts) > 3 and parts[2] == "work":
            shutil.rmtree(store.home.joinpath(*parts[:4]))
        elif path.suffix == ".parquet":
            frame = pl.read_parquet(path)
            texts = [name for name in frame.columns if frame.schema[name] == pl.String]
            write_parquet(path, frame.filter(~pl.any_horizontal(*[_marked(frame[name], needles) for name in texts])))
        elif path.name == "report.json":
            write_report(_pruned(read_json(path), needles), path.parent)
        elif path.suffix == ".json":
            write_json(path, _pruned(read_json(path), needles))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if not needles.inside(line)))
        elif path.name in ("report.html", "report.md") and (path.parent / "report.json").exists():
            write_report(_pruned(read_json(path.parent / "report.json"), needles), path.parent)
    for path in files:  # what is written from elsewhere
        if path.exists() and path.suffix in (".html", ".md", ".txt", ".csv") and _holds(path, needles):
            text = path.read_text(encoding="utf-8")
            for one in sorted((way for text in needles.texts for way in _written(text)), key=len, reverse=True):
                text = text.replace(one, needles.ERASED)
            write_text(path, needles.replaced(text))
    shutil.rmtree(store.tokens, ignore_errors=True)  # rows as token ids: made again when they are needed
    shutil.rmtree(
        store.home / "cache" / "replies", ignore_errors=True
    )  # answers to their prompts, under hashes that tell nothing


def _pruned(value: Any, needles: Needles) -> Any:
    """JSON without the list entries that name one of the ids, and without the texts elsewhere."""
    if isinstance(value, dict):
        return {k: _pruned(v, needles) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_pruned(item, needles) for item in cast("list[Any]", value) if not _names(item, needles)]
    return needles.replaced(value) if isinstance(value, str) else value


def _names(item: Any, needles: Needles) -> bool:
    return isinstance(item, dict) and any(
        value in needles.ids for value in cast("dict[str, Any]", item).values() if isinstance(value, str)
    )


# --- the erasure


def erase(store: Store, ledger: Ledger, plan: Plan, key: bytes, forget_history: Callable[[Needles], int]) -> dict[str, Any]:
    """Removes what the plan names; `forget_history` cleans Dagster's events. Returns the outcome as JSON.

    Raises DataError where something is left afterwards, which is what a concurrent run wrote; then the request stays open.
    """
    traces = plan.traces
    removed = {name: n for name, n in plan.as_dict()["rows"].items() if n} | plan.ledger_rows
    hashes = [hashed_id(one, key) for one in traces.ids]
    erasures.request(ledger, plan.subject, key_check(key), removed, hashes)
    needles = Needles.of(traces)
    events = forget_history(needles)
    _clean(store, plan.files, needles)
    drop_staged(store, traces)
    new: dict[str, str | None] = {}
    for assistant, fingerprint, _ in plan.datasets:
        folder = store.dataset(assistant, fingerprint)
        new[fingerprint] = rewrite(store, assistant, folder, traces)
    _record(store, ledger)
    own = _columns(ledger, traces, key)
    erasures.own_rows(ledger, own, delete=True)
    erasures.take_ownerless(ledger)
    take_out(store, traces, key)
    sweep(store.home, recursive=True, seconds=DRAFT_SECONDS)
    _verify(store, ledger, plan.subject, key, own)
    erasures.complete(ledger, plan.subject)
    assistants = sorted({assistant for assistant, *_ in plan.datasets})
    due = [assistant for assistant in assistants if erasures.retrain_due(ledger, assistant)]
    rewritten = [{"assistant": a, "fingerprint": f, "rows": n, "rewritten_as": new[f]} for a, f, n in plan.datasets]
    return {**plan.as_dict(), "state": "erased", "datasets": rewritten, "history_events": events, "retrain_due": due}


def _record(store: Store, ledger: Ledger) -> None:
    """Every tombstone in the ledger, and what took its place: also those of a run that was killed before it came to that."""
    for assistant, fingerprint, stone in buried(store):
        then = stone["rewritten_as"]
        folder = store.dataset(assistant, then) if then else None
        if folder is not None and (folder / "manifest.json").exists():
            manifest = read_manifest(folder)
            ledger.record_dataset(assistant, manifest["settings"]["select"].get("tenant"), folder, manifest)
        erasures.mark_dataset(ledger, assistant, fingerprint, then, int(stone["rows"]))


def _verify(store: Store, ledger: Ledger, subject: str, key: bytes, own: dict[str, set[str]]) -> None:
    again = find_traces(store, subject, key, lineages(store))
    left = [str(path.relative_to(store.home)) for path in left_over(store, again, key)]
    for rows in (own, _columns(ledger, again, key)):
        left += [f"the ledger's {table}" for table in erasures.own_rows(ledger, rows, delete=False)]
    if again.conversations or left:
        where = ", ".join(left[:5]) or "a data set"
        raise DataError(
            f"Rows of {subject} are in the store again ({where}): a run was writing meanwhile, or the router in a chat of "
            "theirs. When it has ended, erase again."
        )
