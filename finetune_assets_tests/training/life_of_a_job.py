"""A process that buys one training and sees it through, as the assets and the sensor do; tests kill it wherever they like.

python -m finetune_assets_tests.training.life_of_a_job HOME DATASET PROVIDER BASE_URL [BASE_MODEL]

For Bedrock and SageMaker BASE_URL is the stand-in's, as boto3's variables have it already.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from finetune_assets.assistants.settings import Assistant
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import LedgerJournal, open_journal, open_remote, remote_job
from finetune_assets.storage import Store
from finetune_assets.training import openai_wire
from finetune_assets.training.openai_wire import OpenAIWire
from finetune_assets.training.polling import poll
from finetune_assets.training.remote import Connection, Journal, RemoteTrainer
from finetune_assets.training.submission import bill, submit
from finetune_assets.training.trainer import JobHandle
from finetune_assets.training.trainers import AWS
from finetune_assets_tests.training.remote_request import assistant, request

ROLE = "arn:aws:iam::123456789012:role/training"


def settings_of(provider: str, base_url: str, base_model: str | None) -> Assistant:
    """The assistant whose job it is."""
    if provider in AWS:
        place = {"role": ROLE, "bucket": "rows", "image": "registry.example/finetune:1", "region": "us-east-1"}
        return assistant(provider, base_model=base_model, remote={"aws": place, "deploy": provider == "bedrock"})
    return assistant(provider, remote={"base_url": base_url}, budget={"monthly_usd": 0.1} if provider == "openai" else {})


def main(home: Path, dataset: Path, provider: str, base_url: str, base_model: str | None = None) -> None:
    """From estimate to result; a second start goes on where the first was killed."""
    openai_wire.DOUBT_SECONDS = 1.0
    store, ledger = Store(home), Ledger(f"sqlite:///{home / 'ledger.db'}")
    settings = settings_of(provider, base_url, base_model)
    connection = Connection.of(settings)

    def connect(where: Connection, journal: Journal) -> RemoteTrainer:
        if where.provider in AWS:
            return AWS[where.provider](where, store, journal)
        return OpenAIWire(where, store, journal, settle_seconds=0.5)

    asked = request(dataset, settings, "")
    first = connect(connection, _Nothing())
    job = ledger.open_job(
        {
            "assistant": "dental",
            "tenant_id": None,
            "dataset_id": "ds",
            "dataset_fingerprint": asked.fingerprint,
            "provider": provider,
            "base_model": asked.base_model,
            "hyperparameters": {},
            "plan": {},
            "spec_hash": first.spec_hash(asked),
        }
    )
    if job.status in ("pending", "running"):
        journal = open_journal(ledger, job.id, connection.to_dict(), 72)
        job = submit(ledger, job, connect(connection, journal), asked, bill(settings, asked, first.estimate(asked), None, job.id))
    while job.status in ("pending", "running"):
        poll(ledger, open_remote(ledger), connect, None, 30)
        job = ledger.job(job.id)
        time.sleep(0.05)
    folder, remote = store.job(job.spec_hash), remote_job(ledger, job.id)
    assert job.status == "succeeded", job.error
    assert remote is not None
    if not (folder / "result.json").exists():
        handle = JobHandle(provider, str(job.provider_job_id), job.id, job.dataset_fingerprint)
        connect(connection, LedgerJournal(ledger, job.id)).keep(handle, folder, {"base_model": job.base_model})
    ledger.close()


class _Nothing:
    def load(self) -> dict[str, object]:
        return {}

    def save(self, **values: object) -> dict[str, object]:
        raise AssertionError("an estimate writes nothing")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
