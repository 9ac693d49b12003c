"""From a ledger job to a job at a provider: permission, budget, reservation, submission, and what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import BudgetExceeded, FinetuneError, ProviderUnsettled, SettingsError, TrainingError
from finetune_assets.registry import Job, Ledger
from finetune_assets.registry.remote_jobs import SUBMITTED, LedgerJournal, remote_job
from finetune_assets.registry.spending import Limits, Purchase, check, month, release, reserve
from finetune_assets.training import prices
from finetune_assets.training.aws import AwsTrainer
from finetune_assets.training.remote import CANCELLED, TOO_LATE, Connection, RemoteTrainer
from finetune_assets.training.trainer import Estimate, JobHandle, Trainer, TrainingRequest


@dataclass(frozen=True)
class Bill:
    """What a training may cost, and out of what."""

    purchase: Purchase
    limits: Limits


def bill(assistant: Assistant, request: TrainingRequest, estimate: Estimate, project_usd: float | None, reference: str) -> Bill:
    """The bill of a training. Raises BudgetExceeded or SettingsError where it is above `budget.training_usd`."""
    aws = assistant.remote.aws
    container = assistant.trainer == "sagemaker" and not aws.serverless
    mend = prices.missing(*(("sagemaker", aws.instance, "hour") if container else (assistant.trainer, request.base_model)))
    most = assistant.budget.training_usd
    if most is not None and estimate.usd is None:
        raise SettingsError(f"{assistant.name}: budget.training_usd is {most:g}, but nothing says what training costs. {mend}")
    if most is not None and estimate.usd is not None and estimate.usd > most:
        raise BudgetExceeded(
            f"{assistant.name}: the training would cost about ${estimate.usd:.2f}, ${estimate.usd - most:.2f} above "
            f"budget.training_usd (${most:.2f}). Raise it, or lower hyperparameters.epochs or window_weeks."
        )
    purchase = Purchase(reference, assistant.name, assistant.trainer, "training", estimate.usd, estimate.tokens, mend)
    return Bill(purchase, Limits(assistant.budget.monthly_usd, project_usd))


def bought_as(ledger: Ledger, assistant: str, trainer: Trainer, request: TrainingRequest) -> str:
    """The spec hash under which a training is in the ledger, or will be: an AWS job's terms count only since some release.

    The earlier hash is kept where its job is neither failed nor cancelled, and was bought at the same terms.
    """
    key = trainer.spec_hash(request)
    if not isinstance(trainer, AwsTrainer):
        return key
    live = {job.spec_hash: job for job in ledger.jobs(assistant)[::-1] if job.status not in ("failed", "cancelled")}
    earlier = live.get(trainer.earlier_hash(request))
    if key in live or earlier is None or (remote := remote_job(ledger, earlier.id)) is None:
        return key
    return earlier.spec_hash if trainer.same_terms(Connection(**remote.connection)) else key


def bought(ledger: Ledger, assistant: str, provider: str, base_model: str) -> list[str]:
    """Spec hashes of an assistant's jobs that a provider has, or has ended well: what is paid is taken, however old the model."""
    mine = (job for job in ledger.jobs(assistant) if (job.provider, job.base_model) == (provider, base_model))
    return [job.spec_hash for job in mine if job.provider_job_id and job.status not in ("failed", "cancelled")]


def estimate_of(plan: Mapping[str, Any]) -> Estimate:
    """The estimate that a stored plan holds."""
    return Estimate(**{field.name: plan[field.name] for field in fields(Estimate) if field.name in plan})


def check_month(ledger: Ledger, due: Bill) -> None:
    """Holds a bill against this month without writing anything. Raises BudgetExceeded or SettingsError."""
    rows = [row for row in month(ledger) if row["reference"] != due.purchase.reference]
    check(rows, due.purchase, due.limits)


def submit(ledger: Ledger, job: Job, trainer: RemoteTrainer, request: TrainingRequest, due: Bill) -> Job:
    """Submits the ledger's job, or goes on where an earlier try stopped; the ledger's job afterwards.

    Where the provider said no, the job has failed, what was uploaded is deleted and nothing is reserved. Where nobody can tell
    whether it has the job, the ledger's job stays open: the next try, or the sensor, looks for it first.
    """
    journal = LedgerJournal(ledger, job.id)
    current = ledger.job(job.id)  # after its journal was opened: see overview.cancel_job
    if journal.load().get(SUBMITTED):
        return current
    if current.status == "cancelled":
        raise TrainingError(TOO_LATE)
    number = max((version.number for version in ledger.versions(job.assistant)), default=0) + 1
    try:
        reserve(ledger, due.purchase, due.limits)
        trainer.submit(replace(request, run_key=job.id, number=f"v{number}"))
    except FinetuneError as error:
        state = journal.load()
        cancelled = bool(state.get(CANCELLED))
        if not state.get("create_started") and (cancelled or not isinstance(error, ProviderUnsettled)):
            if cancelled:
                journal.save(files_deleted=None)  # who cancelled could not know of a file that was still on its way
            notes = trainer.clean_up(JobHandle(job.provider, "", job.id, request.fingerprint))
            release(ledger, job.id)
            ledger.set_job(job.id, "cancelled" if cancelled else "failed", error=" ".join([str(error), *notes]))
        raise
    return ledger.job(job.id)
