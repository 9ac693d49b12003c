"""Asking for all open remote jobs at once, within a bounded time: what they are now, what they cost, and when to ask again.

One provider is asked from a few threads; the ledger is written from the caller's. A provider that answers 429 is left alone until
it may be asked again. Clocks: deadlines and months go by this machine's; a provider's times are shown, never compared with ours.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_assets.errors import FinetuneError, ProviderError, ProviderUnsettled
from finetune_assets.registry import Job, Ledger
from finetune_assets.registry.remote_jobs import SUBMITTED, LedgerJournal, RemoteJob, record
from finetune_assets.registry.spending import release, settle
from finetune_assets.registry.tables import now
from finetune_assets.training import prices
from finetune_assets.training.remote import Connection, Journal, RemoteTrainer
from finetune_assets.training.trainer import JobHandle, JobState

THREADS = 8
EVENTS = 20
"""Newest events that a tick reads of a running job, for its last metrics."""
EVERY = datetime.timedelta(seconds=30)
LONGEST = datetime.timedelta(minutes=30)
GONE_AFTER = 3
"""Answers of 404 in a row after which a job is taken as gone."""
Connect = Callable[[Connection, Journal], RemoteTrainer]


@dataclass(frozen=True)
class Polled:
    """What asking for one job gave."""

    job: Job
    """As it is in the ledger now."""
    provider_status: str
    progress: dict[str, Any] = field(default_factory=dict[str, Any])
    note: str | None = None
    ended: bool = False


@dataclass(frozen=True)
class _Answer:
    remote: RemoteJob
    state: JobState | None = None
    error: FinetuneError | None = None
    skipped: bool = False
    notes: tuple[str, ...] = ()


def poll(
    ledger: Ledger, jobs: Sequence[RemoteJob], connect: Connect, tables: Path | None = None, seconds: float = 40.0
) -> list[Polled]:
    """Asks for these jobs and writes down what came; those not reached within `seconds` wait for the next time."""
    end = time.monotonic() + seconds
    trainers: dict[str, RemoteTrainer | FinetuneError] = {}
    throttled: set[str] = set()
    for remote in jobs:
        key = json.dumps(remote.connection, sort_keys=True)
        if key not in trainers:
            try:
                trainers[key] = connect(Connection(**remote.connection), LedgerJournal(ledger, remote.job.id))
            except FinetuneError as error:
                trainers[key] = error
    lock = threading.Lock()

    def ask(remote: RemoteJob) -> _Answer:
        key = json.dumps(remote.connection, sort_keys=True)
        trainer = trainers[key]
        if isinstance(trainer, FinetuneError):
            return _Answer(remote, error=trainer)
        if time.monotonic() > end or key in throttled:
            return _Answer(remote, skipped=True)
        try:
            return _ask(ledger, remote, trainer)
        except FinetuneError as error:
            if " 429" in str(error):
                with lock:
                    throttled.add(key)
            return _Answer(remote, error=error)

    polled: list[Polled] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for answer in pool.map(ask, jobs):
            if answer.skipped:
                continue
            polled.append(_write(ledger, answer, tables))
    return polled


def _ask(ledger: Ledger, remote: RemoteJob, trainer: RemoteTrainer) -> _Answer:
    own = trainer.with_journal(LedgerJournal(ledger, remote.job.id))
    if not remote.state.get(SUBMITTED) and own.attach() is None:
        why = "creation was begun, no job is listed" if remote.state.get("create_started") else "it was not submitted yet"
        return _Answer(
            remote, JobState("pending", "not submitted", None, {"warning": f"{why}; start the training again to go on"})
        )
    handle = JobHandle(remote.job.provider, str(LedgerJournal(ledger, remote.job.id).load()[SUBMITTED]), remote.job.id, "")
    state = own.poll(handle)
    if state.status in ("pending", "running") and now() > _naive(remote.deadline):
        own.cancel(handle)
        hours = (_naive(remote.deadline) - _naive(remote.job.created_at)).total_seconds() / 3600
        error = (
            f"stuck: still {state.provider_status!r} after {hours:.0f} hours (remote.max_hours), so it was cancelled. "
            "Start it again, or train elsewhere: finetune migrate ASSISTANT --to TRAINER/MODEL."
        )
        return _Answer(remote, JobState("failed", state.provider_status, error, state.progress))
    progress = dict(state.progress)
    if state.status == "running":
        progress |= last_metrics(own.events(handle, EVENTS))
    notes = tuple(own.clean_up(handle)) if state.status in ("succeeded", "failed", "cancelled") else ()
    return _Answer(remote, replace(state, progress=progress), notes=notes)


def last_metrics(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of the newest event that has some, and the newest message."""
    found: dict[str, Any] = {"message": events[-1].get("message")} if events else {}
    for event in reversed(events):
        numbers = {key: value for key, value in (event.get("data") or {}).items() if isinstance(value, int | float)}
        if numbers:
            return {**found, **numbers}
    return found


def _write(ledger: Ledger, answer: _Answer, tables: Path | None) -> Polled:
    remote, moment = answer.remote, now()
    if answer.error is not None or answer.state is None:
        return _write_error(ledger, remote, answer.error or ProviderUnsettled("no answer"), moment)
    state = answer.state
    progress = {key: value for key, value in state.progress.items() if value is not None}
    notes = [*([str(progress["warning"])] if "warning" in progress else []), *answer.notes]
    note = " ".join(notes) or None
    columns = {"provider_status": state.provider_status, "progress": progress, "note": note, "failures": 0}
    record(ledger, remote.job.id, moment + EVERY, **columns)
    current = ledger.job(remote.job.id)
    if current.status not in ("pending", "running"):  # somebody cancelled it meanwhile
        return Polled(current, state.provider_status, progress, note)
    if state.status in ("pending", "running"):
        status = "running" if "running" in (state.status, current.status) else "pending"  # answers may come out of order
        job = ledger.set_job(current.id, status) if status != current.status else current
        return Polled(job, state.provider_status, progress, note)
    tokens = progress.get("trained_tokens")
    price = prices.find(current.provider, current.base_model, tables)
    usd = price.of_training(int(tokens)) if price and tokens is not None else None
    if state.status != "succeeded" and not tokens and state.status == "failed":
        release(ledger, current.id)
    else:
        settle(ledger, current.id, usd, tokens)
    job = ledger.set_job(current.id, state.status, error=state.error, **({"trained_tokens": tokens} if tokens else {}))
    return Polled(job, state.provider_status, progress, note, ended=True)


def _write_error(ledger: Ledger, remote: RemoteJob, error: FinetuneError, moment: datetime.datetime) -> Polled:
    gone = isinstance(error, ProviderError) and not isinstance(error, ProviderUnsettled) and _says_404(str(error))
    before = _says_404(remote.note or "")
    failures = remote.failures + 1 if before or not gone else 1  # a job is gone when it is unknown so many times in a row
    wait = min(EVERY * 2 ** min(failures, 10), LONGEST)
    record(ledger, remote.job.id, moment + wait, note=str(error), failures=failures)
    if gone and failures >= GONE_AFTER:
        settle(ledger, remote.job.id, None)
        why = f"The provider knows the job no more, asked {failures} times: {error}"
        return Polled(ledger.set_job(remote.job.id, "failed", error=why), "gone", {}, why, ended=True)
    return Polled(ledger.job(remote.job.id), remote.provider_status or "unknown", remote.progress, str(error))


def _says_404(text: str) -> bool:
    return re.search(r"(?<![-\w])404(?![-\w])", text) is not None  # not in an id


def _naive(moment: datetime.datetime) -> datetime.datetime:
    return moment.astimezone(datetime.UTC).replace(tzinfo=None)
