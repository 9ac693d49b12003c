"""What moves rollouts and watches serving from Dagster: two sensors, a person's job, and the schedules of health and digest."""

import datetime
from collections.abc import Iterator

import dagster as dg

from finetune_assets.automation.jobs import train
from finetune_assets.automation.retrain import enrolled, is_training
from finetune_assets.errors import FinetuneError
from finetune_assets.resources import AssistantsResource, LedgerResource, StoreResource
from finetune_assets.resources.tags import REASON
from finetune_assets.serving import control
from finetune_assets.serving.health import health_file
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
def decide(context: dg.OpExecutionContext, config: MoveConfig, store: StoreResource) -> None:
    """`advance`, `hold`, `release` or `rollback`, with who and why, as `finetune rollout` does."""
    assistants, ledger = AssistantsResource(), LedgerResource()
    settings = assistants.load(config.assistant, store.tenants()).rollout
    with ledger.open() as book:
        if config.action == "advance":
            move = control.advance(book, config.assistant, settings, config.reason, config.who)
        elif config.action == "rollback":
            move = control.rollback(book, config.assistant, config.reason, config.who, config.to)
        elif config.action in ("hold", "release"):
            act = control.hold if config.action == "hold" else control.release
            move = act(book, config.assistant, config.reason, config.who)
        else:
            raise dg.Failure(f"action {config.action!r} is none of advance, hold, release, rollback.", allow_retries=False)
    context.log.info(f"{config.assistant}: {move.event} by {config.who}: {move.reason}")


@dg.job(description="A person's hand on a rollout: action advance, hold, release or rollback, with who and why.")
def move_rollout() -> None:
    """One decision."""
    decide()


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    asset_selection=dg.AssetSelection.assets("rollout"),
)
def rollout_steps(
    context: dg.SensorEvaluationContext, store: StoreResource, assistants: AssistantsResource, ledger: LedgerResource
) -> dg.SensorResult | dg.SkipReason:
    """Judges each open rollout (on, held, or back) and starts a version that waited; a change is an observation of `rollout`."""
    known, events = store.tenants(), list[dg.AssetObservation]()
    with ledger.open() as book:
        for name in enrolled(context.instance):
            try:
                move = control.step(book, name, assistants.load(name, known).rollout, "sensor rollout_steps")
                waited = control.offer_waiting(book, name, "sensor rollout_steps") if move is None else None
            except FinetuneError as error:
                context.log.warning(f"{name}: {error}")
                continue
            if move is None and waited is None:
                continue
            state = book.rollout(name)
            said = {"event": move.event if move else "started", "reason": move.reason if move else waited or ""}
            facts = {"champion": state.champion or "base model", "candidate": state.candidate or "none", "step": state.step}
            events.append(
                dg.AssetObservation("rollout", partition=name, metadata={**said, **facts, "generation": state.generation})
            )
    return dg.SensorResult(asset_events=events) if events else dg.SkipReason("No rollout moves.")


@dg.sensor(job=train, minimum_interval_seconds=3600, default_status=dg.DefaultSensorStatus.STOPPED)
def drifted(context: dg.SensorEvaluationContext, store: StoreResource) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Trains an assistant whose users have drifted, by its newest `serving_health`: once a week at most, with the reason."""
    week = f"{datetime.datetime.now(datetime.UTC):%G-W%V}"
    asked = False
    for name in enrolled(context.instance):
        file = health_file(store.store, name)
        measures = read_json(file)["drifted"] if file.exists() else []
        if measures and not is_training(context.instance, name):
            asked = True
            reason = f"drift:{'+'.join(measures)}"
            yield dg.RunRequest(run_key=f"{name}:{reason}:{week}", partition_key=name, tags={REASON: reason})
    if not asked:
        yield dg.SkipReason("Nobody's users have drifted.")


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


weekly_report = dg.ScheduleDefinition(
    name="weekly_report_on_monday",
    job=digest_job,
    cron_schedule="0 8 * * 1",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="The digest, also to the webhook; off until somebody wants it.",
)

JOBS = [health_job, digest_job, move_rollout]
SENSORS = [rollout_steps, drifted]
SCHEDULES = [daily_health, weekly_report]
