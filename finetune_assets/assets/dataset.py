"""Data set: what one assistant trains on, chosen by feedback, split by user, frozen as JSONL. One partition an assistant."""

from itertools import islice
from typing import Any

import dagster as dg

from finetune_assets.assets.metadata import records_table
from finetune_assets.assets.partitions import OWNERS, assistants, every_week
from finetune_assets.assets.plots import funnel_plot, stacked_plot
from finetune_assets.assets.remote import forbidding
from finetune_assets.dataset import (
    by_week,
    check_foreign,
    check_leaks,
    choose,
    freeze,
    latest,
    load_staged,
    prune,
    read_manifest,
    sample_rows,
    stage,
)
from finetune_assets.dataset.formats import read_lines
from finetune_assets.dataset.manifest import CODE_VERSION
from finetune_assets.dataset.privacy import kind_rows, planted_in
from finetune_assets.dataset.reading import window
from finetune_assets.dataset.residual import personal_data_left
from finetune_assets.dataset.selection import Left
from finetune_assets.dataset.semantic import embedding
from finetune_assets.dataset.tool_calls import said
from finetune_assets.dataset.views import vocabulary_rows
from finetune_assets.dataset.wording import leaves
from finetune_assets.evaluation.human.training import ratings_of
from finetune_assets.resources import AssistantsResource, LauncherResource, LedgerResource, StoreResource

Result = dg.MaterializeResult[Any]
TWINS = ["reason", "similarity", "kept", "removed", "kept_message_id", "message_id"]
WHY_NOT = (
    "`finetune explain MESSAGE_ID` says what became of one message and which setting decided. By hand: `dropped.parquet` in the "
    "folder of jsonl_splits, column `reason`; docs/data.md says what changes each."
)
VOCABULARY = ["side", "texts", "words", "vocabulary", "distinct_1", "distinct_2"]


@dg.asset(
    group_name="dataset",
    partitions_def=assistants,
    deps=[every_week("clean_examples"), every_week("rlhf_feedback")],
    kinds={"polars", "parquet"},
    owners=OWNERS,
    code_version=CODE_VERSION,
)
def training_examples(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    assistants: AssistantsResource,
    launcher: LauncherResource,
    ledger: LedgerResource,
) -> Result:
    """The examples that this assistant learns from and is tested on: corrections first, then praised, then satisfied replies.

    Near-duplicates are removed so that the best source survives; each dropped example keeps its reason and its better twin.
    """
    assistant = assistants.load(context.partition_key, store.tenants())
    embed = embedding(
        lambda spec, output: launcher.run(context, spec, output),
        store.store.datasets(assistant.name),
        assistant.filters.semantic_model,
    )
    with ledger.open() as book:
        ratings = ratings_of(store.store, book.engine, assistant.name)
    closed = forbidding(assistants, store) if leaves(assistant) else set[str]()
    choice = choose(store.store, assistant, embed, ratings, closed)
    folder = stage(store.store, assistant, choice)
    notes = choice.notes
    for warning in notes["warnings"]:
        context.log.warning(warning)
    rejected = [{"reason": reason, "examples": number} for reason, number in notes["rejected"].items()]
    sample = sample_rows(choice.kept)
    coverage = notes["coverage"]
    return Result(
        metadata={
            "read": notes["read"],
            "kept": choice.kept.height,
            "dropped": choice.dropped.height,
            "synthetic": notes["augmented"]["rows"],
            **{f"source/{source}": number for source, number in notes["counts"]["source"].items()},
            "preference_pairs": choice.preferences.height,
            "weeks": len(notes["weeks"]),
            "funnel": dg.MetadataValue.md(funnel_plot(notes["funnel"])),
            "why_is_it_not_here": dg.MetadataValue.md(WHY_NOT),
            "dropped_by_reason": records_table(rejected, ["reason", "examples"]),
            "outcome_over_weeks": dg.MetadataValue.md(stacked_plot(notes["outcomes"], "outcome")),
            "dropped_sample": records_table(notes["dropped_sample"], ["reason", "user_text", "reply", "message_id"]),
            "by_source_over_weeks": dg.MetadataValue.md(stacked_plot(by_week(choice.kept, "source"), "source")),
            "by_intent_over_weeks": dg.MetadataValue.md(stacked_plot(by_week(choice.kept, "intent"), "intent")),
            "by_tenant_over_weeks": dg.MetadataValue.md(stacked_plot(by_week(choice.kept, "tenant_id"), "tenant")),
            "intent_divergence_from_live": coverage["intent_divergence"],
            "word_divergence_from_live": coverage["word_divergence"],
            "live_words_covered": coverage["words_covered"],
            "vocabulary": records_table(vocabulary_rows(notes["vocabulary"]), VOCABULARY),
            "synthetic_by_intent": records_table(_augmented(notes["augmented"]), ["intent", "wanted", "made"]),
            "duplicates": records_table(notes["twins"], TWINS),
            "conflicting_feedback": dg.MetadataValue.json(notes["feedback"]["conflicts"]),
            "by_intent": _table("intent", notes["counts"]["intent"]),
            "by_tenant": _table("tenant", notes["counts"]["tenant"]),
            "warnings": dg.MetadataValue.json(notes["warnings"]),
            "sample": records_table(sample, ["split", "source", "intent", "user_text", "reply", "message_id"]),
            "folder": dg.MetadataValue.path(folder),
        }
    )


@dg.asset(
    group_name="dataset",
    partitions_def=assistants,
    deps=[training_examples],
    kinds={"json", "parquet"},
    owners=OWNERS,
    code_version=CODE_VERSION,
)
def jsonl_splits(
    context: dg.AssetExecutionContext, store: StoreResource, assistants: AssistantsResource, ledger: LedgerResource
) -> Result:
    """The frozen data set: train, validation and test as JSONL, preferences, lineage of every line, and a manifest.

    Its fingerprint is a hash of content and data settings; equal content is not written again.
    """
    assistant = assistants.load(context.partition_key, store.tenants())
    manifest = freeze(store.store, assistant, load_staged(store.store, assistant))
    folder = store.store.dataset(assistant.name, manifest["fingerprint"])
    with ledger.open() as book:
        book.record_dataset(assistant.name, assistant.select.tenant, folder, manifest)
        pruned = prune(store.store, assistant, book.datasets_in_use(assistant.name))
    for name in pruned:
        context.log.info(f"Removed the data set {name}: `keep_datasets` is {assistant.keep_datasets}, and nothing uses it.")
    split = manifest["counts"]["split"]
    planted = planted_in(store.store, assistant, folder)
    lines = [line["messages"] for line in islice(read_lines(folder / "train.jsonl"), 3)]
    sample = [{"context": [turn for turn in row[:-1] if turn["role"] != "system"], "reply": said(row[-1])} for row in lines]
    return Result(
        metadata={
            "train": split.get("train", 0),
            "validation": split.get("validation", 0),
            "test": split.get("test", 0),
            "training_rows": manifest["layout"].get(assistant.rows, {}).get("rows", 0),
            "per_conversation_saves": manifest["layout"].get("saved_by_per_conversation", 0.0),
            "preference_pairs": manifest["pairs"]["preferences"].get("train", 0),
            "kto_good": manifest["pairs"]["kto_labels"]["good"],
            "kto_bad": manifest["pairs"]["kto_labels"]["bad"],
            **{f"drift/{name}": value for name, value in manifest.get("drift", {}).items()},
            "personal_data/recall": planted["recall"],
            "personal_data/needless_share": planted["needless_share"],
            "personal_data": records_table(kind_rows(planted), ["kind", "planted", "found", "looked_for"]),
            "pruned": len(pruned),
            "fingerprint": manifest["fingerprint"],
            "sample": records_table(sample, ["context", "reply"]),
            "manifest": dg.MetadataValue.path(folder / "manifest.json"),
            "folder": dg.MetadataValue.path(folder),
        },
        data_version=dg.DataVersion(manifest["fingerprint"]),
    )


@dg.asset_check(asset=jsonl_splits, blocking=True, partitions_def=assistants)
def no_leak_between_splits(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """No conversation, user or near-duplicate stands in two splits, nothing out of time: proven from the frozen files alone."""
    folder = latest(store.store, context.partition_key)
    if folder is None:
        return dg.AssetCheckResult(passed=False, description="There is no frozen data set.")
    problems = check_leaks(folder)
    compared = read_manifest(folder)["leaks"]["compared"]
    numbers = ", ".join(f"{number:,} {what}" for what, number in compared.items())
    description = f"Compared {numbers}: nothing is shared." if not problems else f"{len(problems)} shared: {problems[0]}"
    return dg.AssetCheckResult(passed=not problems, description=description, metadata={"problems": problems, **compared})


@dg.asset_check(asset=jsonl_splits, blocking=True, partitions_def=assistants)
def no_foreign_rows(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """Every row is of the tenant, or the vertical, that the assistant's `select` names."""
    folder = latest(store.store, context.partition_key)
    if folder is None:
        return dg.AssetCheckResult(passed=False, description="There is no frozen data set.")
    problems = check_foreign(folder)
    tenants = ", ".join(read_manifest(folder)["counts"]["tenant"])
    description = problems[0] if problems else f"All rows are of {tenants}."
    return dg.AssetCheckResult(passed=not problems, description=description, metadata={"problems": problems})


@dg.asset_check(asset=jsonl_splits, blocking=True, partitions_def=assistants)
def no_personal_data_left(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """No recogniser finds a personal value or a secret in the frozen files, a tenant's own public contacts aside."""
    folder = latest(store.store, context.partition_key)
    if folder is None:
        return dg.AssetCheckResult(passed=False, description="There is no frozen data set.")
    left, looked = personal_data_left(folder, Left.of(store.store))
    description = f"{looked:,} lines: none found." if not left else f"{len(left)} values left, first in {left[0]}"
    return dg.AssetCheckResult(passed=not left, description=description, metadata={"left": left[:20], "lines": looked})


@dg.asset_check(asset=training_examples, partitions_def=assistants)
def covers_every_week(
    context: dg.AssetCheckExecutionContext, store: StoreResource, assistants: AssistantsResource
) -> dg.AssetCheckResult:
    """How many corpus weeks the examples are behind; Dagster's own staleness does not see through the mapping to weeks."""
    assistant = assistants.load(context.partition_key, store.tenants())
    known = window(store.store.weeks("examples"), assistant.window_weeks)
    used = set(load_staged(store.store, assistant).notes["weeks"])
    missing = [week for week in known if week not in used]
    return dg.AssetCheckResult(
        passed=not missing,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{len(missing)} of {len(known)} weeks are not in the examples."
        if missing
        else f"All {len(known)} weeks are in.",
        metadata={"weeks_behind": len(missing), "missing": missing[:20]},
    )


def _table(name: str, numbers: dict[str, int]) -> dg.TableMetadataValue:
    return records_table([{name: key, "examples": number} for key, number in numbers.items()], [name, "examples"])


def _augmented(notes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"intent": intent, **numbers} for intent, numbers in notes["intents"].items()]


ASSETS = [training_examples, jsonl_splits]
CHECKS = [no_leak_between_splits, no_personal_data_left, no_foreign_rows, covers_every_week]
