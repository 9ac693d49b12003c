"""The weekly retrain. Off until someone turns it on, because it spends."""

from collections.abc import Iterator

import dagster as dg

from finetune_assets.automation.jobs import prepare_corpus
from finetune_assets.automation.retrain import erased_assistants, next_attempt, stale_range, weekly_assistants
from finetune_assets.environment import Environment
from finetune_assets.resources import AssistantsResource, LedgerResource, SourceResource, StoreResource
from finetune_assets.resources.tags import RANGE_END, RANGE_START, REASON, TRAIN_AFTERWARDS


@dg.schedule(
    job=prepare_corpus,
    cron_schedule=Environment.read().retrain_cron,
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Brings the corpus up to date; `corpus_ready` then asks for a training of each assistant with `retrain.weekly`.",
)
def weekly_retrain(
    context: dg.ScheduleEvaluationContext,
    source: SourceResource,
    store: StoreResource,
    assistants: AssistantsResource,
    ledger: LedgerResource,
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """One run over the weeks that are missing or changed; its tags name the assistants to train afterwards."""
    with ledger.open() as book:
        erased = erased_assistants(context.instance, book)
    names = sorted({*weekly_assistants(context.instance, store, assistants), *erased})
    if not names:
        yield dg.SkipReason("No enrolled assistant has `retrain: {weekly: true}`.")
        return
    week = f"{context.scheduled_execution_time:%G-W%V}"
    start, end = stale_range(source, store, ledger, context.scheduled_execution_time.date())
    attempt = next_attempt(context.instance, "prepare_corpus", {REASON: f"weekly:{week}"})
    yield dg.RunRequest(
        run_key=f"{week}:corpus:{attempt}",
        tags={RANGE_START: start, RANGE_END: end, TRAIN_AFTERWARDS: ",".join(names), REASON: f"weekly:{week}"},
    )


SCHEDULES = [weekly_retrain]
