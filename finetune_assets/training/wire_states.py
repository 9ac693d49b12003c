"""What OpenAI's answers about a job mean: its state, its error, a point of its loss curve. Fields may be missing, words new."""

from __future__ import annotations

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from finetune_assets.errors import ProviderUnsettled
from finetune_assets.training import remote
from finetune_assets.training.trainer import JobState, Status

if TYPE_CHECKING:
    from openai.types.fine_tuning import FineTuningJob

STATUS: dict[str, Status] = {
    "validating_files": "pending",
    "queued": "pending",
    "pending": "pending",
    "notRunning": "pending",
    "running": "running",
    "pausing": "running",
    "paused": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
"""Their words to ours. The set is open: a word that is not here means still running, with a warning and a deadline."""


def state_of(job: FineTuningJob, asked: str, provider: str, key: str | None, *, named: bool = True) -> JobState:
    """Ours of theirs; `named`: a finished job says what its model is called. Fields may be missing, and words may be new.

    Raises ProviderUnsettled for another job's answer.
    """
    if getattr(job, "id", None) not in (asked, None):
        raise ProviderUnsettled(f"{provider} answered for job {job.id} when asked for {asked}; asking again later.")
    word = str(getattr(job, "status", None) or "missing")
    status = STATUS.get(word, "running")
    progress: dict[str, Any] = {"trained_tokens": getattr(job, "trained_tokens", None)}
    if word not in STATUS:
        progress["warning"] = f"{provider} says {word!r}, which is not known here; taken as running until the deadline"
    if word in ("paused", "pausing"):
        progress["paused"] = True
    if named and status == "succeeded" and not getattr(job, "fine_tuned_model", None):
        return JobState("running", word, None, {**progress, "warning": "succeeded, but no model is named yet"})
    error = getattr(job, "error", None)
    code, text = getattr(error, "code", None), getattr(error, "message", None)
    why = remote.without_secrets(f"{code}: {text}" if code else str(text), key) if text or code else None
    if status == "failed":
        why = f"{provider} ended the job: {why or 'no reason given'}{_advice(str(code or ''), str(text or ''))}"
    return JobState(status, word, why if status == "failed" else None, progress)


def age(job: FineTuningJob, date: str | None) -> float | None:
    """Seconds from a job's creation to the `Date` of the answer that tells it; null where the two make no sense."""
    made = getattr(job, "created_at", None)
    try:
        seconds = parsedate_to_datetime(date or "").timestamp() - float(made or "")
    except (ValueError, TypeError):
        return None
    return seconds if seconds >= 0 else None


def metrics(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """A point of the loss curve in an event's data, under the names that the local trainer uses."""
    data = event.get("data") or {}
    names = {"train_loss": "loss", "valid_loss": "eval_loss", "full_valid_loss": "eval_loss"}
    point = {ours: float(data[name]) for name, ours in names.items() if isinstance(data.get(name), int | float)}
    return {"step": int(data["step"]), **point} if point and isinstance(data.get("step"), int | float) else None


def _advice(code: str, text: str) -> str:
    """What to do about a job that its provider ended."""
    said = f"{code} {text}".lower()
    if any(word in said for word in ("safety", "unsafe", "moderation", "policy", "refusal")):
        return (
            " The training itself had worked; the provider's safety evaluation refused the model. Look for harmful or borderline "
            "replies in the data set, or train it locally: finetune migrate ASSISTANT --to local/MODEL."
        )
    return ""
