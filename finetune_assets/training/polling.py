"""Asking for all open remote jobs at once, within a bounded time: what they are now, what they cost, and when to ask again.

Providers are asked from a few threads, each request once and for a few seconds. What a thread must not forget it writes to its
job's journal; status, cost and when to ask again are written from the caller's. Who says 429, or does not answer at all, is left
alone for a while. What there is no time for comes first in the next tick.

    answered                               written down; ended jobs are settled by what they cost, after their files are deleted
    no answer, 429, 5xx                    asked again after 30 s, 1 min, 2 min … 30 min, or when the provider says
    404 of the job itself, three times     failed: the provider knows it no more
    in a row, and for an hour
    ended, but a creation of it was not    open until a second job has been looked for long enough
    answered
    past its deadline                      asked to stop, and asked for until it has: one that was cancelled has failed as stuck,
                                           one that ended well meanwhile is taken; a pause does not count
    that an hour ago, still not stopped,   failed: nobody can tell what became of it, and `adrift` looks for it before another
    or no answer three times             one is bought

The deadline is `remote.max_hours` from the submission, or what `trainers.open_hours` makes of it.

Clocks: deadlines and months go by this machine's. A job is stopped at its deadline only where its provider's clock agrees,
if that is told with the job (OpenAI's API does); AWS answers no machine whose clock is wrong.
"""

from __future__ import annotations

import datetime
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune_assets.environment import variable
from finetune_assets.errors import FinetuneError, ProviderError, ProviderJobUnknown, ProviderUnsettled
from finetune_assets.registry import Job, Ledger
from finetune_assets.registry.remote_jobs import SUBMITTED, LedgerJournal, RemoteJob, record
from finetune_assets.registry.spending import settle
from finetune_assets.registry.tables import OPEN_STATUSES, now
from finetune_assets.training.remote import DOUBTFUL, Connection, Journal, RemoteTrainer, without_secrets
from finetune_assets.training.trainer import JobHandle, JobState
from finetune_assets.training.wire_profiles import PROFILES

THREADS = 8
REQUEST_SECONDS = 10.0
"""Of one request; it is tried once, since the next tick asks again."""
EVENTS = 20
"""Newest events that a tick reads of a running job, for its last metrics."""
EVERY = datetime.timedelta(seconds=30)
LONGEST = datetime.timedelta(minutes=30)
STOPPING = datetime.timedelta(hours=1)
"""After the deadline: for how long a job may take to stop, or its provider to answer."""
STOP = "stop"
"""Key of a journal: when the job was asked to stop at its deadline (`asked`, UTC), and what it was (`was`)."""
ADRIFT = "adrift"
"""Key of a journal: the job was given up here, but may still run at its provider."""
IN_A_ROW = 3
"""Answers of 404, or after the deadline none, after which a job is taken as gone; and in a tick, of one provider: as away."""
GONE = datetime.timedelta(hours=1)
"""For how long the provider has to say 404 of a job, and nothing else, until it is taken as gone: another one costs money."""
ELSEWHERE = "Start it again, or train elsewhere: finetune migrate ASSISTANT --to TRAINER/MODEL."
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
    reached: bool = True
    """False: there was no time for it, or its provider was left alone."""


@dataclass(frozen=True)
class _Answer:
    remote: RemoteJob
    state: JobState | None = None
    error: FinetuneError | None = None
    usd: float | None = None
    """What an ended job came to; null where nobody tells, and its estimate stays."""
    notes: tuple[str, ...] = ()


def poll(
    ledger: Ledger, jobs: Sequence[RemoteJob], connect: Connect, tables: Path | None = None, seconds: float = 40.0
) -> list[Polled]:
    """Asks for these jobs and writes down what came, in the order in which it came; it returns within `seconds`, more or less.

    Those that were not reached are at the end of the list, and wait as they were.
    """
    end = time.monotonic() + seconds
    asker = _Asker(ledger, jobs, connect, tables, end)
    pool = ThreadPoolExecutor(THREADS)
    waiting: dict[Future[_Answer | None], RemoteJob] = {pool.submit(asker.ask, remote): remote for remote in jobs}
    polled: list[Polled] = []
    try:
        for future in as_completed(list(waiting), timeout=max(0.0, end - time.monotonic())):
            if (answer := future.result()) is not None:
                polled.append(_write(ledger, answer))
                del waiting[future]
    except TimeoutError:
        pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        asker.close()
    for future, remote in list(waiting.items()):
        if not future.cancelled() and not (future.done() and future.result() is None):  # it is being asked for, without an answer
            answer = future.result() if future.done() else None
            polled.append(_write(ledger, answer or _Answer(remote, error=ProviderUnsettled(f"no answer in {seconds:.0f} s"))))
            del waiting[future]
    return [*polled, *(asker.unreached(remote) for remote in waiting.values())]


class _Asker:
    """One tick: a trainer for each connection, and which of them are left alone."""

    def __init__(self, ledger: Ledger, jobs: Sequence[RemoteJob], connect: Connect, tables: Path | None, end: float) -> None:
        self.ledger, self.tables, self.end = ledger, tables, end
        self.alone: dict[str, datetime.timedelta] = {}
        """Connections that are busy or away, and for how long they want no question."""
        self.unanswered: Counter[str] = Counter()
        self.trainers: dict[str, RemoteTrainer | FinetuneError] = {}
        for remote in jobs:
            key = _key(remote)
            if key not in self.trainers:
                try:
                    made = connect(Connection(**remote.connection), LedgerJournal(ledger, remote.job.id))
                    self.trainers[key] = made.hurried(REQUEST_SECONDS)
                except FinetuneError as error:
                    self.trainers[key] = error

    def ask(self, remote: RemoteJob) -> _Answer | None:
        """In a thread: what came of one job; null where it is not its turn."""
        key = _key(remote)
        trainer = self.trainers[key]
        if isinstance(trainer, FinetuneError):
            return _unanswered(self.ledger, remote, None, trainer)
        if time.monotonic() > self.end or key in self.alone:
            return None
        answer = self._asked(remote, trainer.with_journal(LedgerJournal(self.ledger, remote.job.id)))
        if not isinstance(answer.error, ProviderUnsettled):
            self.unanswered[key] = 0
            return answer
        self.unanswered[key] += 1
        if answer.error.status == 429 or self.unanswered[key] >= IN_A_ROW:
            self.alone[key] = datetime.timedelta(seconds=answer.error.wait or 0)
        return answer

    def _asked(self, remote: RemoteJob, own: RemoteTrainer) -> _Answer:
        try:
            return _ask(self.ledger, remote, own, self.tables)
        except FinetuneError as error:
            told = error
        except Exception as error:
            profile = PROFILES.get(remote.job.provider)
            key_env = remote.connection.get("key_env") or (profile.key_env if profile else "")
            said = without_secrets(f"{type(error).__name__}: {error}", variable(key_env))
            what = f"{remote.job.provider} gave an answer that nobody expected ({said})"
            told = ProviderUnsettled(what)
        return _unanswered(self.ledger, remote, own, told)

    def close(self) -> None:
        """Ends what is still being asked, too."""
        for trainer in self.trainers.values():
            if not isinstance(trainer, FinetuneError):
                trainer.close()

    def unreached(self, remote: RemoteJob) -> Polled:
        """A job that was not asked for. Where its provider is left alone it waits, too."""
        note = "not reached in this tick; it comes first in the next one"
        if (wait := self.alone.get(_key(remote))) is not None:
            note = f"not asked: {remote.job.provider} is busy or away"
            record(self.ledger, remote.job.id, now() + _bounded(wait), note=note, deadline=_deadline(remote))
        return Polled(remote.job, remote.provider_status or "unknown", remote.progress, note, reached=False)


def _key(remote: RemoteJob) -> str:
    return json.dumps(remote.connection, sort_keys=True)


def _ask(ledger: Ledger, remote: RemoteJob, own: RemoteTrainer, tables: Path | None) -> _Answer:
    handle = own.attach()
    if handle is None:
        return _unsubmitted(ledger, remote, own)
    state, journal = own.poll(handle), LedgerJournal(ledger, remote.job.id)
    stop: dict[str, str] | None = remote.state.get(STOP)
    late = stop is None and state.status in OPEN_STATUSES and not state.progress.get("paused") and now() > _deadline(remote)
    if late and (clock := _too_young(remote, state)):
        return _Answer(remote, replace(state, progress={**state.progress, "warning": clock}))
    if late:
        own.cancel(handle)
        stop = {"asked": now().isoformat(" ", "seconds"), "was": state.provider_status}
        journal.save(**{STOP: stop})
        state = own.poll(handle)
    told, state = state, state if stop is None else _stopping(remote, state, stop)
    if told.status in OPEN_STATUSES and state.status == "failed":
        journal.save(**{ADRIFT: True})
    if told.status not in OPEN_STATUSES and journal.load().get(DOUBTFUL):
        return _Answer(remote, _doubted(remote, told))
    if state.status in OPEN_STATUSES:
        metrics = last_metrics(own.events(handle, EVENTS)) if state.status == "running" else {}
        if remote.state.get("missing"):
            journal.save(missing=0, missing_since=None)
        return _Answer(remote, replace(state, progress={**state.progress, **metrics}))
    usd = own.cost(told, remote.job.base_model, remote.job.status == "running", tables)
    return _Answer(remote, state, usd=usd, notes=tuple(own.clean_up(handle)))


def _too_young(remote: RemoteJob, state: JobState) -> str | None:
    """Why a job past its deadline is not stopped: by its provider's clock it is younger, and so ours has jumped."""
    if state.age is None or remote.submitted_at is None:
        return None
    may = (_deadline(remote) - _naive(remote.submitted_at)).total_seconds()
    if state.age > may:
        return None
    return (
        f"this machine's clock is wrong: by it the job is {_hours(remote):.0f} hours old, by that of {remote.job.provider} "
        f"{state.age / 3600:.1f}, which is below remote.max_hours, so it goes on; set the clock right"
    )


def _doubted(remote: RemoteJob, ended: JobState) -> JobState:
    """Of a job that has ended while a second one may be there: open until `attach` has looked for that one long enough."""
    said = f"{ended.provider_status} there ({ended.error})" if ended.error else f"{ended.provider_status} there"
    warning = f"{said}; a creation of it was not answered, so a second job is looked for before that counts"
    progress = {**ended.progress, "warning": " ".join([warning, *([w] if (w := ended.progress.get("warning")) else [])])}
    return replace(ended, status=remote.job.status, error=None, progress=progress)


def _stopping(remote: RemoteJob, state: JobState, stop: dict[str, str]) -> JobState:
    """What a job's state means after it was asked to stop: `cancelled` is the end of a stuck one, any other end is its own."""
    if state.status == "cancelled":
        return replace(state, status="failed", error=f"{_stuck(remote, stop['was'])}, so it was cancelled. {ELSEWHERE}")
    if state.status not in OPEN_STATUSES:
        return state
    until = datetime.datetime.fromisoformat(stop["asked"]) + STOPPING
    stuck = f"{_stuck(remote, stop['was'])}, so it was asked to stop at {stop['asked']} UTC"
    if now() > until and not state.trained:  # what is trained ends by itself, with or without its deployment
        where = f"look at {remote.job.provider} for {remote.job.provider_job_id}, it may still run and cost"
        return replace(state, status="failed", error=f"{stuck}; it still is {state.provider_status!r}: {where}.")
    warning = f"{stuck}; its end is waited for until {until:%H:%M} UTC"
    said = f". {state.progress['warning']}" if "warning" in state.progress else ""
    return replace(state, progress={**state.progress, "warning": warning + said})


def _unsubmitted(ledger: Ledger, remote: RemoteJob, own: RemoteTrainer) -> _Answer:
    """A job of the ledger that the provider does not have."""
    begun = bool(remote.state.get("create_started"))
    why = "creation was begun, no job is listed" if begun else "it was not submitted yet"
    if now() <= _deadline(remote):
        return _Answer(
            remote, JobState("pending", "not submitted", None, {"warning": f"{why}; start the training again to go on"})
        )
    error = f"never submitted: {why} after {_hours(remote):.0f} hours (remote.max_hours). Start the training again."
    if begun:
        LedgerJournal(ledger, remote.job.id).save(**{ADRIFT: True})
    notes = tuple(own.clean_up(_handle(remote)))
    return _Answer(remote, JobState("failed", "not submitted", error), usd=None if begun else 0.0, notes=notes)


def _unanswered(ledger: Ledger, remote: RemoteJob, own: RemoteTrainer | None, error: FinetuneError) -> _Answer:
    """No answer, or a refusal: to be asked again, unless it has been so for long. `own`: null where nobody could be asked."""
    gone = isinstance(error, ProviderJobUnknown)
    missing = int(remote.state.get("missing") or 0) + 1 if gone else 0
    since = datetime.datetime.fromisoformat(str(remote.state.get("missing_since") or now())) if missing > 1 else now()
    if missing != int(remote.state.get("missing") or 0):
        LedgerJournal(ledger, remote.job.id).save(missing=missing, missing_since=str(since) if gone else None)
    why = None
    if missing >= IN_A_ROW and now() - since >= GONE:
        why = f"The provider knows the job no more, asked {missing} times since {since:%Y-%m-%d %H:%M} UTC: {error}"
    elif remote.failures + 1 >= IN_A_ROW and now() > _last_wait(remote):
        why = (
            f"{_stuck(remote, remote.provider_status or 'unknown')}. The provider does not say what became of it ({error}): look "
            f"there for {remote.job.provider_job_id}, it may still run and cost."
        )
    if why is None:
        return _Answer(remote, error=error)
    if remote.state.get(SUBMITTED) or remote.state.get("create_started"):
        LedgerJournal(ledger, remote.job.id).save(**{ADRIFT: True})
    notes = tuple(own.clean_up(_handle(remote))) if own is not None else ()
    return _Answer(remote, JobState("failed", "gone" if gone else "unknown", why), notes=notes)


def _stuck(remote: RemoteJob, word: str) -> str:
    return f"stuck: still {word!r} after {_hours(remote):.0f} hours (remote.max_hours)"


def _handle(remote: RemoteJob) -> JobHandle:
    return JobHandle(remote.job.provider, str(remote.state.get(SUBMITTED) or ""), remote.job.id, remote.job.dataset_fingerprint)


def _deadline(remote: RemoteJob, paused: bool = False) -> datetime.datetime:
    """Without the time in which the job was paused: that between two questions of which one found it so."""
    held = paused or bool(remote.progress.get("paused"))
    since = now() - _naive(remote.polled_at) if held and remote.polled_at else datetime.timedelta()
    return _naive(remote.deadline) + since


def _last_wait(remote: RemoteJob) -> datetime.datetime:
    """Until then a job that is past its deadline may stop, or its provider answer."""
    stop = remote.state.get(STOP)
    return (datetime.datetime.fromisoformat(stop["asked"]) if stop else _deadline(remote)) + STOPPING


def _hours(remote: RemoteJob) -> float:
    return (now() - _naive(remote.job.created_at)).total_seconds() / 3600


def last_metrics(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of the newest event that has some, and the newest message."""
    found: dict[str, Any] = {"message": events[-1].get("message")} if events else {}
    for event in reversed(events):
        numbers = {key: value for key, value in (event.get("data") or {}).items() if isinstance(value, int | float)}
        if numbers:
            return {**found, **numbers}
    return found


def _write(ledger: Ledger, answer: _Answer) -> Polled:
    remote, moment = answer.remote, now()
    if answer.error is not None or answer.state is None:
        return _write_error(ledger, remote, answer.error or ProviderUnsettled("no answer"), moment)
    state = answer.state
    progress = {key: value for key, value in state.progress.items() if value is not None}
    notes = [*([str(progress["warning"])] if "warning" in progress else []), *answer.notes]
    note = " ".join(notes) or None
    columns = {"provider_status": state.provider_status, "progress": progress, "note": note, "failures": 0}
    record(ledger, remote.job.id, moment + EVERY, **columns, deadline=_deadline(remote, bool(progress.get("paused"))))
    current = ledger.job(remote.job.id)
    if current.status not in OPEN_STATUSES:  # somebody cancelled it meanwhile
        return Polled(current, state.provider_status, progress, note)
    if state.status in OPEN_STATUSES:
        status = "running" if "running" in (state.status, current.status) else "pending"  # answers may come out of order
        job = ledger.set_job(current.id, status) if status != current.status else current
        return Polled(job, state.provider_status, progress, note)
    tokens = progress.get("trained_tokens")
    settle(ledger, current.id, answer.usd, tokens)
    job = ledger.set_job(current.id, state.status, error=state.error, **({"trained_tokens": tokens} if tokens else {}))
    return Polled(job, state.provider_status, progress, note, ended=True)


def _write_error(ledger: Ledger, remote: RemoteJob, error: FinetuneError, moment: datetime.datetime) -> Polled:
    failures = remote.failures + 1
    asked = datetime.timedelta(seconds=(error.wait or 0) if isinstance(error, ProviderError) else 0)
    wait = max(EVERY * 2 ** min(failures, 10), asked)
    record(ledger, remote.job.id, moment + _bounded(wait), note=str(error), failures=failures, deadline=_deadline(remote))
    return Polled(ledger.job(remote.job.id), remote.provider_status or "unknown", remote.progress, str(error))


def _bounded(wait: datetime.timedelta) -> datetime.timedelta:
    return min(max(wait, EVERY), LONGEST)


def _naive(moment: datetime.datetime) -> datetime.datetime:
    return moment.astimezone(datetime.UTC).replace(tzinfo=None)
