"""What starts by itself when something happened. A sensor that spends is off until someone turns it on.

No sensor reads files of a model or waits for a job: each tick asks the ledger, the store or the instance, and ends.
"""

import json
from collections.abc import Iterator

import dagster as dg

from finetune_assets.assets.partitions import assistants as assistant_partitions
from finetune_assets.assets.remote import observation
from finetune_assets.automation.failures import explain_failure
from finetune_assets.automation.jobs import JOBS, distil, migrate, prepare_corpus, release, train
from finetune_assets.automation.rented import dying, ending_observation, migration_of, migrations, poll_due, report_polled
from finetune_assets.automation.retrain import (
    due_assistants,
    enough_examples,
    enrolled,
    next_attempt,
    refresh_request,
    was_asked,
)
from finetune_assets.resources import AssistantsResource, LedgerResource, SourceResource, StoreResource, TrainerResource
from finetune_assets.resources.claims import waiting_jobs
from finetune_assets.resources.tags import FEEDBACK, HOST, JOB, MIGRATE_TO, REASON, TRAIN_AFTERWARDS
from finetune_assets.storage import write_json
from finetune_assets.training.lifecycle import WARN_DAYS

MAX_REQUESTS = 20
"""Run requests a tick: a hundred take 23 of the 60 seconds that a tick has."""

ON = dg.DefaultSensorStatus.RUNNING
OFF = dg.DefaultSensorStatus.STOPPED


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS, monitored_jobs=[prepare_corpus], request_job=train, default_status=ON
)
def corpus_ready(context: dg.RunStatusSensorContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """After a corpus run that the schedule or a sensor asked for: one training of each assistant named in its tags."""
    run = context.dagster_run
    names = [name for name in run.tags.get(TRAIN_AFTERWARDS, "").split(",") if name]
    if not names:
        yield dg.SkipReason("This corpus run names no assistant to train.")
    reason = run.tags.get(REASON, "")
    for name in set(names) & set(enrolled(context.instance)):
        attempt = next_attempt(context.instance, train.name, {REASON: reason, "dagster/partition": name})
        key = f"{reason.removeprefix('weekly:')}:{name}:{attempt}"
        yield dg.RunRequest(run_key=key, partition_key=name, tags={REASON: reason})


@dg.sensor(jobs=[prepare_corpus, train], minimum_interval_seconds=300, default_status=OFF)
def feedback_volume(
    context: dg.SensorEvaluationContext,
    source: SourceResource,
    store: StoreResource,
    assistants: AssistantsResource,
    ledger: LedgerResource,
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Starts a training of an assistant when the feedback its last training did not use reaches `retrain.feedback_threshold`.

    Also when a person was erased from what it was last trained on, once.

    Where nothing is due, weeks that are missing or changed are read, and counted at the next tick: not before, since a source
    that never rests, such as the router's own tables, always has one. The run key holds the fingerprint of the last trained data
    set and how often the threshold was reached since: the same feedback never starts two trainings, whatever happens to the
    daemon; and while a training is queued or running nothing more is asked for.
    """
    with ledger.open() as book:
        due = due_assistants(context.instance, store, assistants, book)
    asked = False
    for name, reason, count in due[:MAX_REQUESTS]:
        key = f"{name}:{reason}"
        asked |= not was_asked(context.instance, key)
        yield dg.RunRequest(run_key=key, job_name=train.name, partition_key=name, tags={REASON: reason, FEEDBACK: str(count)})
    refresh = None if asked else refresh_request(context.instance, source, store, ledger)
    if refresh is not None:
        yield refresh
    elif not due:
        yield dg.SkipReason("No assistant has as much new feedback as its threshold, and none was trained on erased rows.")


@dg.sensor(job=release, minimum_interval_seconds=15, default_status=ON)
def finished_jobs(
    context: dg.SensorEvaluationContext, store: StoreResource, ledger: LedgerResource, trainer: TrainerResource
) -> dg.SensorResult | dg.SkipReason:
    """Asks providers for every open remote job, then takes each succeeded job of the ledger into phase two, once.

    A running job is observed on `training_job`; one that failed is told in the log and in `failures/`. A phase two that failed is
    tried again twice.
    """
    known = set(enrolled(context.instance))
    with ledger.open() as book:
        polled = poll_due(book, store, trainer)
        events = [observation(book, one.job) for one in polled if one.reached and one.job.assistant in known]
        waiting = waiting_jobs(context.instance, book, store.store.home)
    for one in polled:
        report_polled(context.log, store, one)
    requests = [
        dg.RunRequest(run_key=f"release:{job.id}:{job.release_attempt}", partition_key=job.assistant, tags={JOB: job.id})
        for job in [job for job in waiting if job.assistant in known][:MAX_REQUESTS]
    ]
    if not requests and not events:
        return dg.SkipReason("No remote job is due, and no finished job waits for phase two.")
    return dg.SensorResult(run_requests=requests, asset_events=events)


@dg.sensor(jobs=[migrate], minimum_interval_seconds=6 * 3600, default_status=ON)
def model_lifecycle(
    context: dg.SensorEvaluationContext,
    store: StoreResource,
    assistants: AssistantsResource,
    ledger: LedgerResource,
    trainer: TrainerResource,
) -> dg.SensorResult | dg.SkipReason:
    """Reads the last days of every rented model in use: warns 90, 30 and 7 days ahead, and opens a migration where one is set.

    A migration (`remote.successor`) trains the same frozen data set on the successor; its benchmark compares both.
    """
    with ledger.open() as book:
        found = dying(store, assistants, book, trainer, context.log)
    warned = set(json.loads(context.cursor or "[]"))
    new = [one for one in found if one.key not in warned]
    for one in new:
        (context.log.error if (one.next_days or 0) <= WARN_DAYS[-1] else context.log.warning)(one.text())
    requests = migrations(context.instance, store, assistants, found)
    if not found:
        return dg.SkipReason(f"No rented model in use ends, or ends to be trained, within {WARN_DAYS[0]} days.")
    cursor = json.dumps(sorted({one.key for one in found}))
    return dg.SensorResult(run_requests=requests, asset_events=[ending_observation(one) for one in new], cursor=cursor)


@dg.run_status_sensor(run_status=dg.DagsterRunStatus.SUCCESS, monitored_jobs=[distil], request_job=migrate, default_status=ON)
def distilled(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
    """After a distillation with the tag finetune/migrate_to: a training on what it froze. The command line does this itself."""
    tags = context.dagster_run.tags
    if MIGRATE_TO not in tags or HOST in tags:
        return dg.SkipReason("This distillation asks for no training.")
    return migration_of(context.instance, context.dagster_run)


@dg.sensor(minimum_interval_seconds=60, default_status=ON, asset_selection=dg.AssetSelection.assets("training_examples"))
def enrol_tenants(
    context: dg.SensorEvaluationContext, store: StoreResource, assistants: AssistantsResource
) -> dg.SensorResult | dg.SkipReason:
    """Adds a partition for each assistant file, and for each tenant with enough satisfied examples. Trains nothing."""
    wanted = {*assistants.names(), *enough_examples(store, assistants)}
    new = sorted(wanted - set(enrolled(context.instance)))
    if not new:
        return dg.SkipReason("Every assistant and every tenant with enough examples has its partition.")
    return dg.SensorResult(dynamic_partitions_requests=[assistant_partitions.build_add_request(new)])


@dg.run_failure_sensor(monitored_jobs=list(JOBS), default_status=ON)
def run_failure(context: dg.RunFailureSensorContext, store: StoreResource) -> None:
    """Says in one place what failed, for whom, why, and what to do; quiet where a gate said no, which is a verdict."""
    notice = explain_failure(context.instance, context.dagster_run, context.failure_event.message or "no reason given")
    if notice is None:
        context.log.info(f"Run {context.dagster_run.run_id}: a gate stopped the rollout; the report says why.")
        return
    context.log.error(notice["message"])
    write_json(store.store.home / "failures" / f"{context.dagster_run.run_id}.json", notice)


SENSORS = [corpus_ready, feedback_volume, finished_jobs, model_lifecycle, distilled, enrol_tenants, run_failure]
