"""What a failed run means to a person: for whom, which step, why, and what to do."""

from __future__ import annotations

from typing import Any

import dagster as dg

from finetune_assets.resources.tags import MIGRATE_TO, RANGE_END, RANGE_START

GATE_ERROR = "DagsterAssetCheckFailedError"
GATED_ASSET = "registered_model"


def step_errors(instance: dg.DagsterInstance, run_id: str) -> list[tuple[str, str, str]]:
    """(step, class, message) of each failed step; the class and message are those of the innermost cause."""
    records = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.STEP_FAILURE).records
    errors: list[tuple[str, str, str]] = []
    for record in records:
        event = record.event_log_entry.dagster_event
        error = event.step_failure_data.error if event else None
        while error is not None and error.cause is not None:
            error = error.cause
        name = error.cls_name if error and error.cls_name else ""
        message = error.message.split("finetune_assets.errors.")[-1].removeprefix(f"{name}: ").strip() if error else ""
        errors.append((event.step_key or "" if event else "", name, message))
    return errors


def stopped_by_gate(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether nothing but gates of `registered_model` failed: a verdict, not a failure."""
    errors = step_errors(instance, run_id)
    return bool(errors) and all(step.startswith(GATED_ASSET) and name == GATE_ERROR for step, name, _ in errors)


def explain_failure(instance: dg.DagsterInstance, run: dg.DagsterRun, fallback: str) -> dict[str, Any] | None:
    """The notice of a failed run, or null where gates stopped the rollout."""
    errors = step_errors(instance, run.run_id)
    if stopped_by_gate(instance, run.run_id):
        return None
    partition = run.tags.get("dagster/partition") or " to ".join(
        run.tags[tag] for tag in (RANGE_START, RANGE_END) if tag in run.tags
    )
    causes = [f"{step}: {message or name}" for step, name, message in errors] or [fallback]
    again = f"finetune run --assistant {partition}" if run.job_name in ("train", "release") else "the job over the same weeks"
    if run.job_name == "migrate":
        again = f"finetune migrate {partition} --to {run.tags.get(MIGRATE_TO, 'TRAINER/MODEL')}"
    message = (
        f"{run.job_name} of {partition or 'all'} failed. "
        + " | ".join(causes)
        + f" When the cause is mended, run again: {again}."
    )
    return {
        "job": run.job_name,
        "partition": partition,
        "run_id": run.run_id,
        "causes": causes,
        "message": message,
        "tags": run.tags,
    }
