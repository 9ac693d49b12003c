"""Evaluation: the new model beside what it would replace, on the same frozen test set, and whether to serve it."""

from pathlib import Path
from typing import Any

import dagster as dg

from finetune_assets.assets.metadata import records_table
from finetune_assets.assets.partitions import GPU_POOL, OWNERS, assistants
from finetune_assets.assets.remote import forbidding_tenants
from finetune_assets.dataset.manifest import read_manifest, standing
from finetune_assets.distillation.parity import FILE as PARITY
from finetune_assets.distillation.parity import sentence as parity_sentence
from finetune_assets.distillation.parity import with_teacher, write_parity
from finetune_assets.evaluation.benchmark import REPORT_VERSION
from finetune_assets.evaluation.bought import asked, leaves, reserve_replies, settle_replies
from finetune_assets.evaluation.history import FILE as HISTORY
from finetune_assets.evaluation.human.book import export, of_study
from finetune_assets.evaluation.human.statistics import evaluate
from finetune_assets.evaluation.human.study import newest
from finetune_assets.evaluation.report import markdown, recommended
from finetune_assets.evaluation.subject import Subject, rated
from finetune_assets.resources import AssistantsResource, LauncherResource, LedgerResource, StoreResource
from finetune_assets.resources.claims import current_version
from finetune_assets.storage import read_json
from finetune_assets.training.machine import default_threads

Result = dg.MaterializeResult[Any]
SHOWN = ("accuracy", "bits_per_byte", "perplexity", "rules", "faithful", "similarity", "chrf", "bleu", "rouge_l", "seconds_p50")


@dg.asset(
    group_name="evaluation",
    partitions_def=assistants,
    deps=["trained_model"],
    kinds={"python"},
    owners=OWNERS,
    pool=GPU_POOL,
    code_version=str(REPORT_VERSION),
)
def benchmark_report(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    assistants: AssistantsResource,
    ledger: LedgerResource,
    launcher: LauncherResource,
) -> Result:
    """Base, few-shot, retrieval, champion, tuned model and endpoints on the same test rows; intervals, gates, verdict, samples.

    Replies are cached by content, so a second report of the same model costs nothing.
    """
    assistant = assistants.load(context.partition_key, store.tenants())
    with ledger.open() as book:
        version = current_version(store.store, book, context.partition_key, context.run_tags)
        dataset = standing(store.store, assistant.name, version.dataset_fingerprint)
        assistant = with_teacher(assistant, read_manifest(dataset))
        subject = Subject.of(store.store, book, assistant, version, dataset)
    subject = subject.with_seeds(lambda spec, output: launcher.run(context, spec, output))
    subject.prepare(default_threads())
    paid, buys = f"benchmark:{version.version}:{context.run_id}", bool(asked(subject.assistant.benchmark))
    with ledger.open() as book:
        if buys:
            forbidding = forbidding_tenants(assistants, store, dataset) if leaves(subject.assistant.benchmark) else []
            reserve_replies(book, subject.assistant, paid, forbidding=forbidding)
        try:
            launcher.run(context, subject.output / "spec.json", subject.output)
        finally:
            spent_usd = settle_replies(book, subject.assistant, subject.output, paid) if buys else 0.0
        report = subject.report(rated(store.store, book, version, assistant.benchmark.judge))
    write_parity(subject.output, subject.folder)
    spent = {"spent_on_replies_usd": round(spent_usd, 6)} if buys else {}
    return Result(metadata={**_told(report, subject.folder), **spent})


def _told(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A report as the metadata of its asset."""
    return {
        "verdict": report["verdict"],
        "recommendation": recommended(report),
        "summary": dg.MetadataValue.md(markdown(report)),
        "test_rows": report["test_rows"],
        **{
            f"{name}/{measure}": float(values[measure]["value"])
            for name, values in report["candidates"].items()
            for measure in SHOWN
            if values.get(measure, {}).get("value") is not None
        },
        "gates": records_table(report["gates"], ["name", "outcome", "value", "low", "high", "limit", "reason"]),
        "report": dg.MetadataValue.path(folder / "report.html"),
        "history": dg.MetadataValue.path(folder.parent / HISTORY),
        "folder": dg.MetadataValue.path(folder),
    }


@dg.asset(
    group_name="evaluation",
    partitions_def=assistants,
    deps=[benchmark_report],
    kinds={"sqlite"},
    owners=OWNERS,
    code_version="1",
)
def human_evaluation(context: dg.AssetExecutionContext, store: StoreResource, ledger: LedgerResource) -> Result:
    """What people said of the newest study of blind pairs: win rate with its interval, agreement, position bias.

    A study is started with `finetune rating start`, rated on the router's page, and read here again at any time.
    """
    study = newest(store.store, context.partition_key)
    if study is None:
        return Result(metadata={"study": "none", "next": f"finetune rating start --assistant {context.partition_key} …"})
    with ledger.open() as book:
        rated = of_study(book.engine, study.assistant, study.name)
    found = evaluate(study, rated)
    folder = store.store.home / "ratings" / study.assistant / study.name
    export(study, rated, folder / "export")
    numbers = {"win_rate": found.win_rate, "left_share": found.left}
    return Result(
        metadata={
            "study": study.name,
            "version": study.version,
            "first": study.candidates[0],
            "second": study.candidates[1],
            "ratings": found.rated,
            "raters": found.raters,
            "counts": dg.MetadataValue.json(found.counts),
            **{name: one.value for name, one in numbers.items() if one.value is not None},
            **{f"{name}_low": one.low for name, one in numbers.items() if one.low is not None},
            **{f"{name}_high": one.high for name, one in numbers.items() if one.high is not None},
            **({"alpha": found.alpha} if found.alpha is not None else {}),
            **({"pairs_needed": found.pairs_needed} if found.pairs_needed is not None else {}),
            "folder": dg.MetadataValue.path(folder),
        }
    )


ASSETS = [benchmark_report, human_evaluation]


@dg.asset_check(asset=benchmark_report, partitions_def=assistants)
def parity_with_teacher(
    context: dg.AssetCheckExecutionContext, store: StoreResource, ledger: LedgerResource
) -> dg.AssetCheckResult:
    """How near a distilled model comes to its teacher, on the same test rows. It blocks nothing."""
    with ledger.open() as book:
        version = current_version(store.store, book, context.partition_key, context.run.tags)
    file = store.store.report(version.assistant, version.version) / PARITY
    if not file.exists():
        return dg.AssetCheckResult(passed=True, description="Not distilled: there is no teacher to compare with.")
    found = read_json(file)
    numbers = {name: found[name]["value"] for name in ("same", "chrf", "similarity", "chrf_to_reference") if found.get(name)}
    metadata = {name: float(value) for name, value in numbers.items() if value is not None}
    return dg.AssetCheckResult(
        passed=bool(found["rows"]), severity=dg.AssetCheckSeverity.WARN, description=parity_sentence(found), metadata=metadata
    )


CHECKS: list[dg.AssetChecksDefinition] = [parity_with_teacher]
