"""Distillation: the training contexts of a frozen data set with the replies of a rented model, ready for another trainer."""

from typing import Any

import dagster as dg

from finetune_assets.assets.partitions import OWNERS, assistants
from finetune_assets.assets.remote import check_leaves
from finetune_assets.assets.training import frozen_dataset
from finetune_assets.distillation.work import Wishes, Work
from finetune_assets.environment import Environment
from finetune_assets.resources import AssistantsResource, LedgerResource, StoreResource
from finetune_assets.resources.tags import MAX_USD, SAID_SINCE, TEACHER

Result = dg.MaterializeResult[Any]


@dg.asset(
    group_name="dataset",
    partitions_def=assistants,
    deps=["jsonl_splits"],
    kinds={"jsonl", "openai"},
    owners=OWNERS,
    code_version="1",
)
def distilled_dataset(
    context: dg.AssetExecutionContext, store: StoreResource, assistants: AssistantsResource, ledger: LedgerResource
) -> Result:
    """What a rented tuned model says to the training contexts, filtered by the same rules and by feedback; frozen beside it.

    Replies come from the router's log, or by asking within the budget; each is paid once. Run it with the job `distil` and the
    tags finetune/teacher, finetune/max_usd, finetune/said_since; with finetune/migrate_to a training on it follows.
    """
    assistant = assistants.load(context.partition_key, store.tenants())
    folder = frozen_dataset(store.store, assistant.name, context.run_tags)
    check_leaves(assistants, store, assistant, folder)
    wishes = Wishes.of(context.run_tags, (TEACHER, MAX_USD, SAID_SINCE))
    with ledger.open() as book:
        work = Work(store.store, book, assistant, context.log.info, Environment.read().monthly_usd)
        manifest = work.distil(folder, wishes)
    about = manifest["distilled"]
    return Result(
        metadata={
            "fingerprint": manifest["fingerprint"],
            "teacher": about["name"],
            "contexts": about["contexts"],
            "learnt": dg.MetadataValue.json(about["learnt"]),
            "kept_as_they_were": dg.MetadataValue.json(about["kept_as_they_were"]),
            "left_out": dg.MetadataValue.json(about["left_out"]),
            "from": folder.name,
            "folder": dg.MetadataValue.path(store.store.dataset(assistant.name, manifest["fingerprint"])),
        },
        data_version=dg.DataVersion(manifest["fingerprint"]),
    )


ASSETS = [distilled_dataset]
CHECKS: list[dg.AssetChecksDefinition] = []
