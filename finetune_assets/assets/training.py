"""Training: what it will take, one job, and the finished model. The same three assets whoever trains."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.assets.live import observed
from finetune_assets.assets.metadata import records_table
from finetune_assets.assets.partitions import GPU_POOL, OWNERS, assistants
from finetune_assets.assets.plots import curve_plot
from finetune_assets.assets.remote import (
    Plan,
    check_remote,
    ending_models,
    keep_remote,
    remote_metadata,
    replaced_by,
    settings_for,
    submit_remote,
)
from finetune_assets.dataset import latest
from finetune_assets.dataset.manifest import standing
from finetune_assets.errors import BudgetExceeded, DataError, LedgerError, ModelUnavailable, TrainingError
from finetune_assets.registry import Job, Ledger
from finetune_assets.resources import AssistantsResource, LauncherResource, LedgerResource, StoreResource, TrainerResource
from finetune_assets.resources.claims import claim, cli_owner, current_job
from finetune_assets.resources.tags import APPROVED, DATASET
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training.candidates import ranked
from finetune_assets.training.lifecycle import WARN_DAYS
from finetune_assets.training.plan import check_budget
from finetune_assets.training.publish import content_hash, publish, whole_model
from finetune_assets.training.spec import RECIPE, request_for
from finetune_assets.training.submission import bought, bought_as, estimate_of
from finetune_assets.training.trainer import Estimate

Result = dg.MaterializeResult[Any]

SHOWN = 5
"""Sentences of a check about models that stop."""
PLOTTED = 400
"""Most points of a curve on an asset page."""


def frozen_dataset(store: Store, assistant: str, tags: Mapping[str, str]) -> Path:
    """The data set that a run's tag names, else the newest. Raises DataError where there is none."""
    folder = standing(store, assistant, tags[DATASET]) if DATASET in tags else latest(store, assistant)
    if folder is None:
        raise DataError(f"{assistant} has no frozen data set; materialise jsonl_splits first.")
    return folder


@dg.asset(
    group_name="training", partitions_def=assistants, deps=["jsonl_splits"], kinds={"python"}, owners=OWNERS, code_version=RECIPE
)
def training_plan(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    assistants: AssistantsResource,
    trainer: TrainerResource,
    launcher: LauncherResource,
    ledger: LedgerResource,
) -> Result:
    """What the training will take before anything is spent: tokens by the model's own tokenizer, time, memory, cost.

    A plan above the assistant's `budget` stops here.
    """
    assistant = settings_for(assistants, store, context.partition_key, context.run_tags)
    folder = frozen_dataset(store.store, assistant.name, context.run_tags)
    request, warnings = request_for(assistant, folder, folder.name)
    for warning in warnings:
        context.log.warning(warning)
    backend = trainer.of(assistant, store.store, lambda spec, output: launcher.run(context, spec, output))
    try:
        backend.validate(request)
    except ModelUnavailable:  # too late to buy it, not to take what is bought
        with ledger.open() as book:
            own = bought(book, assistant.name, backend.provider, request.base_model)
            if bought_as(book, assistant.name, backend, request) not in own:
                raise
    estimate = backend.estimate(request)
    if estimate.note:
        context.log.warning(estimate.note)
    if estimate.rows_shortened or estimate.rows_left_out:
        context.log.warning(
            f"{estimate.rows_shortened:,} rows are longer than hyperparameters.max_length or the model's context and lose their "
            f"oldest turns; {estimate.rows_left_out:,} are left out, since their reply leaves no room for a prompt."
        )
    with ledger.open() as book:
        key = bought_as(book, assistant.name, backend, request)
    if backend.provider == "local":
        check_budget(assistant, estimate)
    else:
        check_remote(assistants, store, ledger, trainer, assistant, Plan(request, estimate, key))
    here = backend.provider == "local" and launcher.workers.here
    table = [one.row() for one in ranked(assistant, backend, request, estimate, here=here)] if assistant.candidates else []
    stages = [{"objective": name, **values.to_dict()} for name, values in request.chain]
    plan = {
        **asdict(estimate),
        "spec_hash": key,
        "dataset_fingerprint": folder.name,
        "base_model": request.base_model,
        "trainer": backend.provider,
        "objective": list(request.objective),
        "adapter": request.adapter,
        "preset": request.preset,
        "hyperparameters": request.hyperparameters.to_dict(),
        "stages": stages,
        "candidates": table,
        "seed": request.seed,
        "warnings": warnings,
        "compare_with": replaced_by(ledger, assistant.name, context.run_tags),
    }
    write_json(store.store.plan(assistant.name), plan)
    return Result(metadata={**_planned(estimate, plan), "plan": dg.MetadataValue.path(store.store.plan(assistant.name))})


def _planned(estimate: Estimate, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan as metadata."""
    stages, table = plan["stages"], plan["candidates"]
    return {
        "tokens": estimate.tokens,
        "tokens_counted_exactly": estimate.exact,
        "measured_by": _measured_by(estimate),
        "rows_shortened": estimate.rows_shortened,
        "rows_left_out": estimate.rows_left_out,
        "estimated_minutes": round((estimate.seconds or 0) / 60, 2),
        "estimated_usd": dg.MetadataValue.float(estimate.usd) if estimate.usd is not None else "no price or rate is known",
        "estimated_memory_gib": round((estimate.memory_bytes or 0) / 2**30, 3),
        **({"note": estimate.note} if estimate.note else {}),
        "base_model": plan["base_model"],
        "stages": records_table(stages, list(stages[0])),
        **({"candidates": records_table(table, list(table[0]))} if table else {}),
    }


def _measured_by(estimate: Estimate) -> str:
    if estimate.peers:
        return f"{estimate.peers} finished jobs of the same kind"
    return "ten steps of this training" if estimate.probed else "the number of weights"


@dg.asset(
    group_name="training",
    partitions_def=assistants,
    deps=[training_plan],
    kinds={"pytorch", "huggingface"},
    owners=OWNERS,
    pool=GPU_POOL,
    code_version=RECIPE,
)
def training_job(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    assistants: AssistantsResource,
    ledger: LedgerResource,
    trainer: TrainerResource,
    launcher: LauncherResource,
) -> Result:
    """Runs one local job in a child process, or submits one remote job. The same data set and settings are not trained twice.

    A job that was killed goes on from its last whole checkpoint.
    """
    assistant = settings_for(assistants, store, context.partition_key, context.run_tags)
    folder = frozen_dataset(store.store, assistant.name, context.run_tags)
    request, _ = request_for(assistant, folder, folder.name)
    backend = trainer.of(assistant, store.store, lambda spec, output: launcher.run(context, spec, output))
    with ledger.open() as book:
        key = bought_as(book, assistant.name, backend, request)
    plan = plan_of(store.store, assistant.name, folder.name, key)
    if assistant.require_approval and context.run_tags.get(APPROVED) != "true":
        raise BudgetExceeded(
            f"{assistant.name} has `require_approval: true`, and nobody approved this run. Start it with `finetune run "
            f"--assistant {assistant.name} --approve`, or in the UI with the tag {APPROVED}: true."
        )
    if backend.provider != "local":  # before the job is opened: a refusal leaves none
        check_remote(assistants, store, ledger, trainer, assistant, Plan(request, estimate_of(plan), plan["spec_hash"]))
    with ledger.open() as book:
        manifest = read_json(folder / "manifest.json")
        job = book.open_job(
            {
                "assistant": assistant.name,
                "tenant_id": assistant.select.tenant,
                "dataset_id": book.record_dataset(assistant.name, assistant.select.tenant, folder, manifest),
                "dataset_fingerprint": folder.name,
                "provider": backend.provider,
                "base_model": request.base_model,
                "hyperparameters": request.hyperparameters.to_dict(),
                "plan": plan,
                "spec_hash": plan["spec_hash"],
            }
        )
        if backend.provider != "local":
            job = submit_remote(trainer, store, book, assistant, request, job)
            return Result(metadata=remote_metadata(book, job))
        if job.status == "succeeded" and (store.store.job(job.spec_hash) / "result.json").exists():
            context.log.info(f"Data set and settings are those of {job.id}, which has succeeded: not trained again.")
            return _trained(store.store, book, job, plan, reused=True)
        book.set_job(job.id, "running")
        try:
            with observed(context, store.store.job(job.spec_hash)):
                handle = backend.submit(request)
            state = backend.poll(handle)
        except Exception as error:
            if book.job(job.id).status == "cancelled":
                raise TrainingError(f"{job.id} was cancelled; start it again and it goes on from its last checkpoint.") from None
            book.set_job(job.id, "failed", error=str(error))
            raise
        if state.status != "succeeded":
            book.set_job(job.id, "failed", error=state.error)
            raise TrainingError(f"{job.id} ended as {state.provider_status}: {state.error or 'no reason given'}")
        tokens = backend.result(handle).metrics.get("tokens")
        book.set_job(job.id, "succeeded", openai_job_id=handle.id, trained_tokens=tokens, error=None)
        return _trained(store.store, book, job, plan, reused=False)


def plan_of(store: Store, assistant: str, fingerprint: str, spec_hash: str) -> dict[str, Any]:
    """The stored plan of this very training. Raises DataError where it is of another data set, trainer, model or setting."""
    path = store.plan(assistant)
    plan = read_json(path) if path.exists() else {}
    if plan.get("dataset_fingerprint") != fingerprint:
        raise DataError(f"{assistant} has no training plan for the data set {fingerprint}; materialise training_plan first.")
    if plan.get("spec_hash") != spec_hash:
        raise DataError(
            f"The training plan of {assistant} is of {plan.get('trainer')}/{plan.get('base_model')} with other settings (spec "
            f"{plan.get('spec_hash')}, now {spec_hash}): its estimate and checks do not hold. Materialise training_plan again."
        )
    return plan


def _trained(store: Store, book: Ledger, job: Job, plan: dict[str, Any], *, reused: bool) -> Result:
    folder = store.job(job.spec_hash)
    result = read_json(folder / "result.json")
    metadata: dict[str, Any] = {
        "job": job.id,
        "reused": reused,
        "steps": int(result["steps"]),
        "tokens": int(result["tokens"]),
        "seconds": round(float(result.get("wall_seconds") or result["seconds"]), 1),
        "seconds_estimated": round(float(plan.get("seconds") or 0.0), 1),
        "tokens_per_second": round(float(result["tokens"]) / max(float(result["seconds"]), 1e-9), 1),
        "train_loss": round(float(result["train_loss"]), 4),
        "times_resumed": int(result.get("resumed", 0)),
        "memory_gib": round(float(result.get("memory_bytes") or 0) / 2**30, 3),
        "memory_gib_estimated": round(float(plan.get("memory_bytes") or 0) / 2**30, 3),
        **_curves(folder / "training_log.jsonl"),
        **_preferred(result),
        "folder": dg.MetadataValue.path(folder),
    }
    if result.get("eval_loss") is not None:
        metadata["eval_loss"] = round(float(result["eval_loss"]), 4)
    if result.get("recoveries"):
        metadata["recoveries"] = records_table(result["recoveries"], ["stage", "step", "what", "did", "cause"])
    return Result(metadata=metadata)


def _curves(log: Path) -> dict[str, Any]:
    """A plot of each stage's losses, and one each of learning rate, gradient's norm, speed and memory."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    every = -(-len(lines) // PLOTTED) or 1
    read = [point for point in map(json.loads, lines) if "recovery" not in point]
    points = [point for at, point in enumerate(read) if at % every == 0 or "eval_loss" in point or at == len(read) - 1]
    made: dict[str, Any] = {}
    stages = list(dict.fromkeys(str(point["stage"]) for point in points))
    for stage in stages:
        own = [point for point in points if point["stage"] == stage]
        series = {
            "training loss": [(p["step"], p["loss"]) for p in own if "loss" in p],
            "validation loss": [(p["step"], p["eval_loss"]) for p in own if "eval_loss" in p],
        }
        name = "loss_curve" if len(stages) == 1 else f"loss_curve_{stage}"
        made[name] = dg.MetadataValue.md(curve_plot({k: v for k, v in series.items() if v}, "step", "loss"))
    others = (
        ("learning_rate", "learning_rate", "learning rate × 10⁶", 1e6),
        ("grad_norm", "grad_norm", "norm of the gradient", 1.0),
        ("speed", "tokens_per_second", "tokens a second", 1.0),
        ("memory", "memory_gib", "memory, GiB", 1.0),
    )
    for name, key, title, scale in others:
        found = [(p["step"], p[key] * scale) for p in points if key in p]
        if found:
            made[name] = dg.MetadataValue.md(curve_plot({title: found}, "step", title))
    return made


def _preferred(result: Mapping[str, Any]) -> dict[str, Any]:
    """What dpo or kto did to held-out preferences."""
    made: dict[str, Any] = {}
    for stage in result.get("stages", []):
        held = stage.get("heldout")
        if not held or held["reward_accuracy"]["value"] is None:
            continue
        accuracy, nats = held["reward_accuracy"], held["good_nats_per_token"]
        made |= {
            "reward_accuracy": round(accuracy["value"], 4),
            "reward_accuracy_low": round(accuracy["low"], 4),
            "reward_accuracy_high": round(accuracy["high"], 4),
            "good_replies_nats_per_token_before": round(nats["before"], 4),
            "good_replies_nats_per_token_after": round(nats["after"], 4),
            "likelihood_fell": bool(held["likelihood_fell"]),
        }
    return made


@dg.asset(
    group_name="training", partitions_def=assistants, deps=[training_job], kinds={"huggingface"}, owners=OWNERS, code_version="1"
)
def trained_model(
    context: dg.AssetExecutionContext, store: StoreResource, ledger: LedgerResource, trainer: TrainerResource
) -> Result:
    """The finished model as an immutable version: numbered within its assistant, named after its content."""
    with ledger.open() as book:
        job = current_job(store.store, book, context.partition_key, context.run_tags)
        owner = cli_owner() if job.released_by == cli_owner() else f"run:{context.run_id}"
        if job.released_at is None and not claim(context.instance, book, job, owner, store.store.home):
            raise LedgerError(f"{job.id} is being released by {book.job(job.id).released_by}; this run leaves it alone.")
        if job.provider != "local":
            keep_remote(trainer, store, book, job)
        model = whole_model(store.store.job(job.spec_hash))
        version = book.mint_version(
            job, content_hash(model, job.dataset_fingerprint), store.store.model(job.assistant, "x").parent
        )
        publish(store.store.job(job.spec_hash), Path(version.path))
        book.set_job(job.id, "succeeded", fine_tuned_model=version.version, completed_at=job.completed_at)
    size = sum(file.stat().st_size for file in Path(version.path).rglob("*") if file.is_file())
    return Result(
        metadata={
            "version": version.version,
            "job": job.id,
            "base_model": job.base_model,
            "size_mb": round(size / 1e6, 2),
            "dataset_fingerprint": job.dataset_fingerprint,
            "folder": dg.MetadataValue.path(version.path),
            "settings": dg.MetadataValue.json(json.loads(json.dumps(job.hyperparameters))),
        },
        data_version=dg.DataVersion(version.content_hash),
    )


ASSETS = [training_plan, training_job, trained_model]


@dg.asset_check(asset=trained_model, partitions_def=assistants)
def model_lives(
    context: dg.AssetCheckExecutionContext,
    assistants: AssistantsResource,
    store: StoreResource,
    ledger: LedgerResource,
    trainer: TrainerResource,
) -> dg.AssetCheckResult:
    """Whether all rented models of this assistant go on answering: 90 days ahead it warns, 30 days ahead it fails."""
    with ledger.open() as book:
        found = ending_models(context, assistants, store, book, trainer)
    if not found:
        return dg.AssetCheckResult(
            passed=True, description="Nothing of this assistant depends on a rented model whose last day is known."
        )
    first = found[0]
    days = first.next_days if first.next_days is not None else first.jobs_days_left
    stops = any(one.days_left is not None and one.days_left <= WARN_DAYS[1] for one in found)
    urgent = [one for one in found if one.urgent]
    more = [f"and {len(urgent) - SHOWN} more: finetune doctor"] if len(urgent) > SHOWN else []
    return dg.AssetCheckResult(
        passed=not urgent,
        severity=dg.AssetCheckSeverity.ERROR if stops else dg.AssetCheckSeverity.WARN,
        description=" | ".join([*(one.text() for one in (urgent or found)[:SHOWN]), *more]),
        metadata={"days_left": days if days is not None else 0, "model": first.use.model, "models": len(found)},
    )


CHECKS: list[dg.AssetChecksDefinition] = [model_lives]
