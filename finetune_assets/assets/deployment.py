"""Deployment: every version in the registry with its verdict and card; only one that should be served becomes champion."""

from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.assets.partitions import OWNERS, assistants
from finetune_assets.dataset.manifest import standing
from finetune_assets.evaluation.card import model_card
from finetune_assets.evaluation.gates import GATES
from finetune_assets.registry import Version
from finetune_assets.resources import AssistantsResource, LedgerResource, StoreResource
from finetune_assets.resources.claims import current_version
from finetune_assets.storage import Store, read_json, write_text
from finetune_assets.training import base_model

Result = dg.MaterializeResult[Any]


def _report(store: Store, version: Version) -> dict[str, Any]:
    return read_json(store.report(version.assistant, version.version) / "report.json")


@dg.asset(
    group_name="deployment",
    partitions_def=assistants,
    deps=["benchmark_report"],
    kinds={"sqlite"},
    owners=OWNERS,
    code_version="1",
)
def registered_model(
    context: dg.AssetExecutionContext, store: StoreResource, assistants: AssistantsResource, ledger: LedgerResource
) -> Result:
    """The version in the ledger with its verdict, and its model card written from the lineage; failed versions too.

    The gates are this asset's checks: one that does not pass blocks `rollout`, not the record.
    """
    assistant = assistants.load(context.partition_key, store.tenants())
    with ledger.open() as book:
        version = current_version(store.store, book, context.partition_key, context.run_tags)
        report = _report(store.store, version)
        manifest = read_json(standing(store.store, assistant.name, version.dataset_fingerprint) / "manifest.json")
        training = read_json(Path(version.path) / "result.json")
        card = model_card(manifest, training, report, base_model.card(version.base_model))
        write_text(Path(version.path) / "README.md", card)
        write_text(Path(version.path) / "card.md", card)
        file = store.store.report(assistant.name, version.version) / "report.html"
        stored = book.register(assistant.name, version.version, report["verdict"], report["reasons"], str(file))
        if stored.verdict != "serve":
            book.release_done(version.job_id)  # the gates stop this run here; else `rollout` ends it
    return Result(
        metadata={
            "version": stored.version,
            "verdict": stored.verdict or "",
            "reasons": dg.MetadataValue.json(stored.reasons or []),
            "card": dg.MetadataValue.md(card),
            "folder": dg.MetadataValue.path(stored.path),
            "report": dg.MetadataValue.path(file),
        },
        data_version=dg.DataVersion(f"{stored.version}:{stored.verdict}"),
    )


def _gate_check(gate: str, description: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=registered_model, name=gate, description=description, blocking=True, partitions_def=assistants)
    def check(context: dg.AssetCheckExecutionContext, store: StoreResource, ledger: LedgerResource) -> dg.AssetCheckResult:
        with ledger.open() as book:
            report = _report(store.store, current_version(store.store, book, context.partition_key, context.run.tags))
        found = next((one for one in report["gates"] if one["name"] == gate), None)
        if found is None or found["outcome"] == "not_applicable":
            reason = found["reason"] if found else "This gate is switched off in the assistant's settings."
            return dg.AssetCheckResult(passed=True, description=reason, metadata={"outcome": "not_applicable"})
        numbers = {key: float(found[key]) for key in ("value", "low", "high", "limit") if found.get(key) is not None}
        return dg.AssetCheckResult(
            passed=found["outcome"] == "passed",
            description=found["reason"],
            metadata={"outcome": found["outcome"], "version": report["model_version"], **numbers},
        )

    return check


@dg.asset_check(asset=registered_model, blocking=True, partitions_def=assistants)
def verdict_is_serve(context: dg.AssetCheckExecutionContext, store: StoreResource, ledger: LedgerResource) -> dg.AssetCheckResult:
    """All gates together: the stored verdict of this version is `serve`."""
    with ledger.open() as book:
        version = current_version(store.store, book, context.partition_key, context.run.tags)
    verdict = (version.verdict or "not benchmarked").replace("_", " ")
    return dg.AssetCheckResult(
        passed=version.verdict == "serve",
        description=f"{version.version}: {verdict}. " + " ".join((version.reasons or [])[:3]),
        metadata={"version": version.version, "verdict": verdict},
    )


@dg.asset(
    group_name="deployment", partitions_def=assistants, deps=[registered_model], kinds={"sqlite"}, owners=OWNERS, code_version="1"
)
def rollout(context: dg.AssetExecutionContext, store: StoreResource, ledger: LedgerResource) -> Result:
    """The only way to become champion: reads the stored verdict of the exact version again, and promotes `serve` only."""
    with ledger.open() as book:
        version = current_version(store.store, book, context.partition_key, context.run_tags)
        before = book.rollout(context.partition_key)
        if version.verdict != "serve":
            raise dg.Failure(
                f"{version.version} of {context.partition_key} has the verdict {version.verdict}: it does not become champion.",
                metadata={"reasons": dg.MetadataValue.json(version.reasons or []), "champion": before.champion or "none"},
                allow_retries=False,
            )
        if before.champion != version.version:
            reason = (version.reasons or ["verdict serve"])[0]
            book.promote(context.partition_key, version.version, before.generation, reason, f"run {context.run_id}")
        now = book.rollout(context.partition_key)
        book.release_done(version.job_id)
    return Result(
        metadata={
            "champion": now.champion or "",
            "previous": before.champion or "none",
            "changed": before.champion != now.champion,
            "generation": now.generation,
        },
        data_version=dg.DataVersion(f"{now.generation}:{now.champion}"),
    )


ASSETS = [registered_model, rollout]
CHECKS = [*(_gate_check(name, text) for name, text in GATES.items()), verdict_is_serve]
