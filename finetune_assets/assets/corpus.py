"""Corpus: what was said and what people thought of it, a week a partition, all tenants.

Nothing disappears: a row that breaks a rule is in `corpus/rejected` with its reason, and `read = kept + dropped` is a check.
"""

from typing import Any

import dagster as dg

from finetune_assets import corpus
from finetune_assets.assets.metadata import records_table, rejected_table, sample_table, week_numbers
from finetune_assets.assets.partitions import OWNERS, weeks
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, write_tenants
from finetune_assets.corpus.losses import losses
from finetune_assets.corpus.parallel import Reading, in_workers
from finetune_assets.resources import LauncherResource, LedgerResource, SourceResource, StoreResource
from finetune_assets.resources.project import let_go
from finetune_assets.resources.tags import RANGE_END, RANGE_START
from finetune_assets.storage import read_json

RANGE = dg.BackfillPolicy.single_run()
Result = dg.MaterializeResult[Any]


def _result(context: dg.AssetExecutionContext, store: StoreResource, table: str, counts: dict[str, dict[str, Any]]) -> Result:
    """Each week's numbers, sample rows and folder go to its own partition; the UI plots the numbers over the weeks."""
    for week, numbers in counts.items():
        metadata = {
            **week_numbers(numbers),
            "sample": sample_table(store.store, table, week),
            "folder": dg.MetadataValue.path(store.store.corpus(table, week)),
        }
        rejected = rejected_table(store.store, week)
        if rejected is not None:
            metadata["rejected_sample"] = rejected
        context.add_asset_metadata(metadata, partition_key=week)
        if gone := numbers.get("vanished"):
            context.log.warning(
                f"{gone:,} stored conversations of week {week} are no longer in the source, and went from the store."
            )
        context.log.info(f"{table} of week {week}: {numbers['kept']} kept of {numbers['read']} read")
    return Result()


def _in_workers(
    context: dg.AssetExecutionContext, store: StoreResource, launcher: LauncherResource, table: str, reading: Reading | None
) -> dict[str, dict[str, Any]] | None:
    """The run's weeks, built by several workers at once where FINETUNE_WEEK_WORKERS asks for it and there are several."""
    workers, weeks_ = launcher.workers.weeks, context.partition_keys
    if min(workers, len(weeks_)) < 2:
        return None
    return in_workers(store.store, table, weeks_, reading, workers, lambda tasks: launcher.run_all(context, tasks))


@dg.asset(
    group_name="corpus",
    partitions_def=weeks,
    backfill_policy=RANGE,
    kinds={"parquet", "polars"},
    owners=OWNERS,
    code_version=corpus.CODE_VERSIONS["raw_conversations"],
)
def raw_conversations(
    context: dg.AssetExecutionContext,
    source: SourceResource,
    store: StoreResource,
    ledger: LedgerResource,
    launcher: LauncherResource,
) -> Result:
    """Conversations that started in the week: validated, and scrubbed of personal data while they are read.

    One row a conversation, its messages nested. Users are keyed pseudonyms. Rows that break the schema are set aside in
    `corpus/rejected` with table, id, reason and detail.
    """
    erased = ledger.erased(store.key, source.requests())
    tables = source.read(erased, context.run.run_id)
    counts = _in_workers(
        context, store, launcher, "conversations", Reading.of(source.addresses(), source.folder, erased.subjects)
    )
    if counts is None:
        counts = ingest_conversations(store.store, tables, context.partition_keys, store.key)
    else:
        write_tenants(store.store, tables)
    return _result(context, store, "conversations", counts)


@dg.asset(
    group_name="corpus",
    partitions_def=weeks,
    backfill_policy=RANGE,
    kinds={"parquet", "polars"},
    owners=OWNERS,
    code_version=corpus.CODE_VERSIONS["rlhf_feedback"],
)
def rlhf_feedback(
    context: dg.AssetExecutionContext,
    source: SourceResource,
    store: StoreResource,
    ledger: LedgerResource,
    launcher: LauncherResource,
) -> Result:
    """Thumbs, ratings and corrections that were given in the week, which may be weeks after their message."""
    erased = ledger.erased(store.key, source.requests())
    counts = _in_workers(context, store, launcher, "feedback", Reading.of(source.addresses(), source.folder, erased.subjects))
    if counts is None:
        tables = source.read(erased, context.run.run_id)
        counts = ingest_feedback(store.store, tables, context.partition_keys, store.key)
    let_go()
    return _result(context, store, "feedback", counts)


@dg.asset(
    group_name="corpus",
    partitions_def=weeks,
    backfill_policy=RANGE,
    deps=[raw_conversations],
    kinds={"parquet", "polars"},
    owners=OWNERS,
    code_version=corpus.CODE_VERSIONS["clean_examples"],
)
def clean_examples(context: dg.AssetExecutionContext, store: StoreResource, launcher: LauncherResource) -> Result:
    """One row for each assistant reply: the conversation so far, the reply, and what rules without settings say of it."""
    counts = _in_workers(context, store, launcher, "examples", None)
    return _result(context, store, "examples", counts or build_examples(store.store, context.partition_keys))


def _adds_up(store: StoreResource, table: str) -> dg.AssetCheckResult:
    wrong: dict[str, Any] = {}
    checked = store.store.weeks(table)
    for week in checked:
        numbers = read_json(store.store.corpus(table, week) / "counts.json")
        for name, read in numbers["read"].items():
            kept, dropped = numbers["kept"].get(name, 0), numbers["dropped"].get(name, 0)
            if read != kept + dropped:
                wrong[f"{week} {name}"] = f"read {read}, kept {kept}, dropped {dropped}"
    return dg.AssetCheckResult(
        passed=not wrong,
        description=f"{len(checked)} weeks: read = kept + dropped"
        if not wrong
        else f"{len(wrong)} tables of weeks do not add up",
        metadata={"weeks": len(checked), "wrong": wrong},
    )


@dg.asset_check(asset=raw_conversations, blocking=True)
def every_conversation_row_accounted(store: StoreResource) -> dg.AssetCheckResult:
    """Rows read are rows kept plus rows dropped with a reason, for conversations and messages of every week."""
    return _adds_up(store, "conversations")


@dg.asset_check(asset=rlhf_feedback, blocking=True)
def every_feedback_row_accounted(store: StoreResource) -> dg.AssetCheckResult:
    """Rows read are rows kept plus rows dropped with a reason, for feedback of every week."""
    return _adds_up(store, "feedback")


@dg.asset_check(asset=clean_examples, blocking=True)
def every_reply_accounted(store: StoreResource) -> dg.AssetCheckResult:
    """Each assistant reply is an example or was left out with a reason."""
    return _adds_up(store, "examples")


def _mostly_kept(context: dg.AssetCheckExecutionContext, store: StoreResource, table: str) -> dg.AssetCheckResult:
    """Of the run's weeks; of all that are stored where the check runs by itself."""
    tags = context.run.tags
    first, last = (tags.get(tag, tags.get("dagster/partition", "")) for tag in (RANGE_START, RANGE_END))
    found = losses(store.store, [table], first, last)
    large = [loss.sentence for loss in found if loss.large]
    return dg.AssetCheckResult(
        passed=not large,
        severity=dg.AssetCheckSeverity.WARN,
        description="\n".join(large) or "No table lost a large share of its rows.",
        metadata={"losses": records_table([loss.record() for loss in found], ["table", "read", "dropped", "share", "reasons"])},
    )


@dg.asset_check(asset=raw_conversations)
def conversations_mostly_kept(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """At most a twentieth of the conversations and of the messages that the run read was dropped."""
    return _mostly_kept(context, store, "conversations")


@dg.asset_check(asset=rlhf_feedback)
def feedback_mostly_kept(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """At most a twentieth of the feedback that the run read was dropped."""
    return _mostly_kept(context, store, "feedback")


ASSETS = [raw_conversations, rlhf_feedback, clean_examples]
CHECKS = [
    every_conversation_row_accounted,
    every_feedback_row_accounted,
    every_reply_accounted,
    conversations_mostly_kept,
    feedback_mostly_kept,
]
