"""Deployment: every version in the registry with its verdict and card; the rollout; what users saw; the week's digest."""

from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.assets.metadata import records_table
from finetune_assets.assets.partitions import OWNERS, assistants
from finetune_assets.dataset.manifest import standing
from finetune_assets.evaluation.card import model_card
from finetune_assets.evaluation.gates import GATES
from finetune_assets.registry import Version
from finetune_assets.resources import AssistantsResource, LedgerResource, StoreResource
from finetune_assets.resources.claims import current_version
from finetune_assets.serving.control import offer
from finetune_assets.serving.digest import COLUMNS, digest
from finetune_assets.serving.health import health, health_file
from finetune_assets.serving.notify import notify
from finetune_assets.storage import Store, read_json, write_json, write_text
from finetune_assets.training import base_model
from finetune_assets.training.remote import RemoteModel

Result = dg.MaterializeResult[Any]
NOT_ASKED = "Switched off in the assistant's settings, or there is nothing that it is about: no champion, no canaries, no suite."
DRIFT_COLUMNS = ["measure", "live", "training", "distance", "limit", "drifted", "detail"]


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
        version = current_version(store.store, book, context.partition_key, context.run.tags)
        report = _report(store.store, version)
        manifest = read_json(standing(store.store, assistant.name, version.dataset_fingerprint) / "manifest.json")
        training = read_json(Path(version.path) / "result.json")
        about = {} if RemoteModel.read(version.path) else base_model.card(version.base_model)  # a provider's model has none here
        card = model_card(manifest, training, report, about)
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
            reason = found["reason"] if found else NOT_ASKED
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
    group_name="deployment", partitions_def=assistants, deps=[registered_model], kinds={"sqlite"}, owners=OWNERS, code_version="2"
)
def rollout(context: dg.AssetExecutionContext, store: StoreResource, ledger: LedgerResource) -> Result:
    """The only way to become champion: shadow, then a growing share of the users, then all; or back.

    Reads the stored verdict of the exact version again, and brings `serve` into shadow. What follows is decided step by step from
    what users see, by the router and the sensor `rollout_steps`, or by a person. A version that was rolled back does not come
    back by itself; where users see another candidate, this one waits for the end of its rollout.
    """
    name = context.partition_key
    with ledger.open() as book:
        version = current_version(store.store, book, name, context.run.tags)
        if version.verdict != "serve":
            raise dg.Failure(
                f"{version.version} of {name} has the verdict {version.verdict}: it is not rolled out.",
                metadata={"reasons": dg.MetadataValue.json(version.reasons or [])},
                allow_retries=False,
            )
        reason = (version.reasons or ["verdict serve"])[0]
        done = offer(book, name, version.version, reason, f"run {context.run.run_id}")
        now = book.rollout(name)
        book.release_done(version.job_id)
    return Result(
        metadata={
            "version": version.version,
            "done": done,
            "champion": now.champion or "base model",
            "candidate": now.candidate or "none",
            "step": now.step,
            "share": now.share,
            "generation": now.generation,
        },
        data_version=dg.DataVersion(f"{now.generation}:{now.champion}:{now.candidate}:{now.step}"),
    )


@dg.asset(group_name="deployment", partitions_def=assistants, deps=[rollout], kinds={"sqlite"}, owners=OWNERS, code_version="1")
def serving_health(
    context: dg.AssetExecutionContext, store: StoreResource, assistants: AssistantsResource, ledger: LedgerResource
) -> Result:
    """What the router saw of an assistant in the last seven days, and how far its users have drifted from the training set."""
    settings = assistants.load(context.partition_key, store.tenants())
    with ledger.open() as book:
        seen = health(book, store.store, settings)
        state = book.rollout(context.partition_key)
    write_json(health_file(store.store, context.partition_key), seen.as_dict())
    numbers = {key: round(float(value), 4) for key, value in seen.numbers.items() if value is not None}
    return Result(
        metadata={
            **numbers,
            "champion": state.champion or "base model",
            "candidate": state.candidate or "none",
            "step": state.step,
            "drift_measures": records_table(
                seen.drift_rows, ["measure", "live", "training", "distance", "limit", "drifted", "detail"]
            ),
            "versions": dg.MetadataValue.json(seen.versions),
        }
    )


def _health(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dict[str, Any]:
    return read_json(health_file(store.store, context.partition_key))


@dg.asset_check(asset=serving_health, partitions_def=assistants)
def few_errors(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """Errors, timeouts and policy violations of the week, by the bound of the assistant's `rollout.max_errors`."""
    seen = _health(context, store)
    return dg.AssetCheckResult(passed=seen["few_errors"], description=seen["errors_text"])


@dg.asset_check(asset=serving_health, partitions_def=assistants)
def no_drift(context: dg.AssetCheckExecutionContext, store: StoreResource) -> dg.AssetCheckResult:
    """Users ask as they did in the training set; drift is a reason to train again, and the sensor `drifted` does if it is on."""
    seen = _health(context, store)
    return dg.AssetCheckResult(passed=not seen["drifted"], severity=dg.AssetCheckSeverity.WARN, description=seen["drift_text"])


@dg.asset(group_name="deployment", deps=[serving_health], kinds={"markdown"}, owners=OWNERS, code_version="2")
def weekly_digest(store: StoreResource, assistants: AssistantsResource, ledger: LedgerResource) -> Result:
    """One page for people: what served, what it cost, who met a candidate, and what is different from the week before."""
    with ledger.open() as book:
        names = sorted({*assistants.names(), *(state.assistant for state in book.rollouts())})
        text, rows = digest(book, names)
    write_text(store.store.home / "serving" / "digest.md", text)
    problems = notify(text, {"assistants": rows})
    return Result(
        metadata={
            "digest": dg.MetadataValue.md(text),
            "requests": sum(row["requests"] for row in rows),
            "people": sum(row["users"] for row in rows),
            "met_a_candidate": sum(row["exposed"] for row in rows),
            "usd": round(sum(row[name] or 0.0 for row in rows for name in ("usd", "shadow_usd", "spent_usd")), 4),
            "weeks": records_table(
                rows, ["assistant", "live", "candidate", *(n + s for n in ("verdict", *COLUMNS) for s in ("", "_before"))]
            ),
            "not_delivered": len(problems),
        }
    )


ASSETS = [registered_model, rollout, serving_health, weekly_digest]
CHECKS = [*(_gate_check(name, text) for name, text in GATES.items()), verdict_is_serve, few_errors, no_drift]
