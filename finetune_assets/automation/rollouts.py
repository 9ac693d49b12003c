"""What moves rollouts and watches serving: two sensors, a person's job, and the schedules of health, digest and retention."""

import datetime
from collections.abc import Iterator
from typing import Any

import dagster as dg

from finetune_assets.assets.metadata import records_table
from finetune_assets.assistants.settings.serving import RolloutSettings
from finetune_assets.automation.jobs import prepare_corpus, train
from finetune_assets.automation.retrain import ACTIVE, enrolled, is_training, refresh_request, was_asked
from finetune_assets.errors import FinetuneError, RolloutRefused
from finetune_assets.registry import Ledger
from finetune_assets.resources import AssistantsResource, LedgerResource, SourceResource, StoreResource
from finetune_assets.resources.claims import MAX_ATTEMPTS
from finetune_assets.resources.tags import REASON
from finetune_assets.serving import control
from finetune_assets.serving.health import health_file
from finetune_assets.serving.retention import expire, stated
from finetune_assets.storage import read_json

health_job = dg.define_asset_job("watch_serving", selection=["serving_health"], description="Health and drift of an assistant.")
digest_job = dg.define_asset_job(
    "weekly_report", selection=["weekly_digest"], description="The week's page, also to the webhook."
)


class MoveConfig(dg.Config):
    """A person's decision about a rollout."""

    assistant: str
    action: str
    reason: str
    who: str
    to: str | None = None


@dg.op
def decide(
    context: dg.OpExecutionContext,
    config: MoveConfig,
    store: StoreResource,
    assistants: AssistantsResource,
    ledger: LedgerResource,
) -> None:
    """`advance`, `hold`, `release` or `rollback`, with who and why, as `finetune rollout` does."""
    try:
        settings = assistants.load(config.assistant, store.tenants()).rollout
        with ledger.open() as book:
            move = _decided(book, config, settings)
    except FinetuneError as refused:
        raise dg.Failure(str(refused), allow_retries=False) from None
    context.log.info(f"{config.assistant}: {move.event} by {config.who}: {move.reason}")


def _decided(book: Ledger, config: MoveConfig, settings: RolloutSettings) -> control.Move:
    if config.action == "advance":
        return control.advance(book, config.assistant, settings, config.reason, config.who)
    if config.action == "rollback":
        return control.rollback(book, config.assistant, config.reason, config.who, config.to, settings=settings)
    if config.action in ("hold", "release"):
        act = control.hold if config.action == "hold" else control.release
        return act(book, config.assistant, config.reason, config.who)
    raise RolloutRefused(f"action {config.action!r} is none of advance, hold, release, rollback.")


@dg.job(description="A person's hand on a rollout: action advance, hold, release or rollback, with who and why.")
def move_rollout() -> None:
    """One decision."""
    decide()


@dg.op
def expire_rows(
    context: dg.OpExecutionContext, store: StoreResource, assistants: AssistantsResource, ledger: LedgerResource
) -> None:
    """What the router stored and an assistant's `serving.keep_days` no longer keeps, as `finetune retention --yes` does."""
    with ledger.open() as book:
        for name, days in stated(book, assistants.path, store.tenants()).items():
            removed = expire(book, name, days, apply=True)
            context.log.info(f"{name}, older than {days} days: " + ", ".join(f"{n} {what}" for what, n in removed.items()))


@dg.job(description="Removes the router's rows that are older than `serving.keep_days`, of each assistant that states it.")
def apply_retention() -> None:
    """One round over the assistants."""
    expire_rows()


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    asset_selection=dg.AssetSelection.assets("rollout"),
)
def rollout_steps(
    context: dg.SensorEvaluationContext, store: StoreResource, assistants: AssistantsResource, ledger: LedgerResource
) -> dg.SensorResult | dg.SkipReason:
    """Judges each open rollout (on, held, or back) and starts a version that waited; shows each change as an observation of
    `rollout`, whoever made it: this sensor, the router's judge or a person."""
    known, names = store.tenants(), enrolled(context.instance)
    with ledger.open() as book:
        for name in names:
            try:
                if control.step(book, name, assistants.load(name, known).rollout, "sensor rollout_steps") is None:
                    control.offer_waiting(book, name, "sensor rollout_steps")
            except FinetuneError as error:
                context.log.warning(f"{name}: {error}")
        events = book.events_after(int(context.cursor or 0))
    if not events:
        return dg.SkipReason("No rollout moves.")
    shown = [_observed(event) for event in events if event["assistant"] in names]
    return dg.SensorResult(asset_events=shown, cursor=str(events[-1]["id"]))


def _observed(event: dict[str, Any]) -> dg.AssetObservation:
    """A line of a rollout's history, with what the guards said."""
    facts = {name: str(event[name] or "") for name in ("event", "version", "step", "reason", "actor")}
    guards = [
        {name: str(guard[name]) for name in ("name", "outcome", "text")} for guard in (event["evidence"] or {}).get("guards", [])
    ]
    metadata: dict[str, Any] = {**facts, "at": str(event["created_at"]), "generation": event["generation"]}
    if guards:
        metadata["guards"] = records_table(guards, ["name", "outcome", "text"])
    return dg.AssetObservation("rollout", partition=event["assistant"], metadata=metadata)


@dg.sensor(jobs=[prepare_corpus, train], minimum_interval_seconds=600, default_status=dg.DefaultSensorStatus.STOPPED)
def drifted(
    context: dg.SensorEvaluationContext, source: SourceResource, store: StoreResource, ledger: LedgerResource
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Trains an assistant whose users have drifted, by its newest `serving_health`: once a week at most, with the reason.

    What the users said has to be in the corpus first: once a week it is read before.
    """
    week = f"drift:{datetime.datetime.now(datetime.UTC):%G-W%V}"
    due: dict[str, str] = {}
    for name in enrolled(context.instance):
        file = health_file(store.store, name)
        measures = read_json(file)["drifted"] if file.exists() else []
        reason = f"drift:{'+'.join(measures)}"
        if measures and not is_training(context.instance, name) and not was_asked(context.instance, f"{name}:{reason}:{week}"):
            due[name] = reason
    if not due:
        yield dg.SkipReason("Nobody's users have drifted, or the training was asked for.")
        return
    readings = context.instance.get_runs(dg.RunsFilter(job_name=prepare_corpus.name, tags={REASON: week}))
    if any(run.status in ACTIVE for run in readings):
        yield dg.SkipReason("The corpus is being read first.")
        return
    if not any(run.status == dg.DagsterRunStatus.SUCCESS for run in readings):
        attempt = len(readings) + 1
        refresh = refresh_request(context.instance, source, store, ledger) if attempt <= MAX_ATTEMPTS else None
        if refresh is not None:
            yield refresh.with_replaced_attrs(run_key=f"{week}:corpus:{attempt}", tags={**refresh.tags, REASON: week})
            return
        if readings:
            yield dg.SkipReason(
                "The corpus cannot be read: what the users said is not in it, and a training would change nothing."
            )
            return
    for name, reason in due.items():
        yield dg.RunRequest(run_key=f"{name}:{reason}:{week}", job_name=train.name, partition_key=name, tags={REASON: reason})


@dg.schedule(
    job=health_job, cron_schedule="30 2 * * *", execution_timezone="UTC", default_status=dg.DefaultScheduleStatus.RUNNING
)
def daily_health(context: dg.ScheduleEvaluationContext, ledger: LedgerResource) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """`serving_health` of every assistant that has or had a rollout."""
    with ledger.open() as book:
        served = {state.assistant for state in book.rollouts()}
    names = [name for name in enrolled(context.instance) if name in served]
    for name in names:
        yield dg.RunRequest(run_key=f"{name}:{context.scheduled_execution_time:%F}", partition_key=name)
    if not names:
        yield dg.SkipReason("No assistant is served yet.")


@dg.schedule(
    job=apply_retention, cron_schedule="0 4 * * *", execution_timezone="UTC", default_status=dg.DefaultScheduleStatus.RUNNING
)
def daily_retention(
    context: dg.ScheduleEvaluationContext, store: StoreResource, assistants: AssistantsResource, ledger: LedgerResource
) -> dg.RunRequest | dg.SkipReason:
    """`apply_retention`, where an assistant states how long its rows are kept."""
    with ledger.open() as book:
        if stated(book, assistants.path, store.tenants()):
            return dg.RunRequest(run_key=f"{context.scheduled_execution_time:%F}")
    return dg.SkipReason("No assistant states `serving.keep_days`: everything is kept.")


weekly_report = dg.ScheduleDefinition(
    name="weekly_report_on_monday",
    job=digest_job,
    cron_schedule="0 8 * * 1",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="The digest, also to the webhook; off until somebody wants it.",
)

JOBS = [health_job, digest_job, move_rollout, apply_retention]
SENSORS = [rollout_steps, drifted]
SCHEDULES = [daily_health, daily_retention, weekly_report]
