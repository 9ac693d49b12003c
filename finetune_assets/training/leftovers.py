"""Files that a job which failed or was cancelled left at its provider, because deleting them failed: deleted at a later tick."""

from __future__ import annotations

import datetime
import time
from contextlib import closing

from finetune_assets.errors import FinetuneError
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import SUBMITTED, LedgerJournal, RemoteJob, lost_remote, record
from finetune_assets.registry.tables import now
from finetune_assets.training.polling import REQUEST_SECONDS, Connect
from finetune_assets.training.remote import Connection
from finetune_assets.training.trainer import JobHandle

AGAIN = datetime.timedelta(minutes=30)
DAYS = 30
"""For how long after a job was opened its files are tried to be deleted."""


def delete_leftovers(ledger: Ledger, connect: Connect, seconds: float) -> None:
    """Tries again for each job that is due; begins with none after `seconds`. Why it failed stands in the job's note."""
    end = time.monotonic() + seconds
    for remote in lost_remote(ledger, now(), now() - datetime.timedelta(days=DAYS)):
        if not _left(remote):
            continue
        if time.monotonic() > end:
            return
        job, journal = remote.job, LedgerJournal(ledger, remote.job.id)
        handle = JobHandle(job.provider, str(remote.state.get(SUBMITTED) or ""), job.id, job.dataset_fingerprint)
        try:
            with (
                closing(connect(Connection(**remote.connection), journal)) as made,
                closing(made.hurried(REQUEST_SECONDS)) as own,
            ):
                notes = own.clean_up(handle)
        except FinetuneError as error:
            notes = [str(error)]
        record(ledger, job.id, now() + AGAIN, note=" ".join(notes) or None)


def _left(remote: RemoteJob) -> bool:
    sent = remote.state.get("training_file") or remote.state.get("uris")
    wanted = remote.connection.get("options", {}).get("delete_files", True)
    return bool(sent and wanted and not remote.state.get("files_deleted"))
