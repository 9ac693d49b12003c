"""Jobs that ended here without anybody knowing what became of them at their provider: looked for before another one is paid."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from finetune_assets.errors import FinetuneError, ProviderJobUnknown, TrainingError
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import LedgerJournal, RemoteJob, failed_remote, record
from finetune_assets.registry.spending import settle
from finetune_assets.registry.tables import OPEN_STATUSES, now
from finetune_assets.training.polling import ADRIFT, REQUEST_SECONDS, Connect
from finetune_assets.training.remote import Connection, RemoteTrainer


def check(ledger: Ledger, assistant: str, provider: str, connect: Connect, tables: Path | None = None) -> None:
    """Raises TrainingError where a job of this assistant may still run at this provider: another one would be paid beside it."""
    for remote in failed_remote(ledger, assistant, provider):
        if not remote.state.get(ADRIFT):
            continue
        job, journal = remote.job, LedgerJournal(ledger, remote.job.id)
        try:
            with (
                closing(connect(Connection(**remote.connection), journal)) as made,
                closing(made.hurried(REQUEST_SECONDS)) as own,
            ):
                word = look_for(ledger, remote, own, tables)
        except FinetuneError as error:
            word = f"unknown: {error}"
        if word is not None:
            its = job.provider_job_id or "its id was never told"
            raise TrainingError(
                f"{job.id} of {assistant} may still run at {provider} ({its}, {word}), although it was given up here; nothing is "
                f"bought beside it. Stop it with `finetune jobs cancel {job.id}`, or wait until it has ended, then start the "
                f"training again. Where {provider} cannot tell, look there; `finetune jobs cancel {job.id} --ended` says that it "
                "is over."
            )


def look_for(ledger: Ledger, remote: RemoteJob, own: RemoteTrainer, tables: Path | None = None) -> str | None:
    """The provider's word for a job that may still run there; null where it does not.

    It is settled then by what it came to; one that has trained a model is open again, and the next tick takes it. Raises
    ProviderError where nobody can tell.
    """
    job, journal = remote.job, LedgerJournal(ledger, remote.job.id)
    try:
        handle = own.attach()
        state = own.poll(handle) if handle is not None else None
    except ProviderJobUnknown:
        state = None
    if state is not None and state.status in OPEN_STATUSES and not state.trained:
        return state.provider_status
    if state is not None and (state.trained or state.status == "succeeded"):
        record(ledger, job.id, now(), failures=0)
        ledger.set_job(job.id, "running", error=None, completed_at=None)
    elif state is not None:
        usd = own.cost(state, job.base_model, True, tables)
        settle(ledger, job.id, usd, state.progress.get("trained_tokens"))
    journal.save(**{ADRIFT: None, "missing": 0, "missing_since": None})
    return None
