"""The code location: it loads, imports nothing heavy, and its graph is the one that is drawn here."""

import subprocess
import sys

import dagster as dg
import pytest

from finetune_assets_tests.code_location import DEFINITIONS

GRAPH = {
    "raw_conversations": [],
    "rlhf_feedback": [],
    "clean_examples": ["raw_conversations"],
    "training_examples": ["clean_examples", "rlhf_feedback"],
    "jsonl_splits": ["training_examples"],
    "distilled_dataset": ["jsonl_splits"],
    "training_plan": ["jsonl_splits"],
    "training_job": ["training_plan"],
    "trained_model": ["training_job"],
    "benchmark_report": ["trained_model"],
    "human_evaluation": ["benchmark_report"],
    "registered_model": ["benchmark_report"],
    "rollout": ["registered_model"],
    "serving_health": ["rollout"],
    "weekly_digest": ["serving_health"],
}
BLOCKING = {
    "raw_conversations": ["every_conversation_row_accounted"],
    "rlhf_feedback": ["every_feedback_row_accounted"],
    "clean_examples": ["every_reply_accounted"],
    "jsonl_splits": ["no_foreign_rows", "no_leak_between_splits", "no_personal_data_left"],
    "registered_model": [
        "above_similarity_floor",
        "better_than_base",
        "canaries",
        "checks",
        "empty",
        "faithful",
        "forgetting",
        "keeps_details",
        "not_worse_than_champion",
        "other_tenant",
        "overfitting",
        "parity",
        "perplexity",
        "personal_data",
        "refused",
        "repeated",
        "reply_seconds",
        "rules",
        "toxic",
        "training_loss",
        "verdict_is_serve",
    ],
}
HEAVY = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "sentence_transformers",
    "openai",
    "boto3",
    "evaluate",
    "numba",
    "accelerate",
]


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return DEFINITIONS


def test_it_is_loadable(definitions: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(definitions)  # raises where a partition mapping does not fit
    assert definitions.resolve_job_def("release").partitions_def == definitions.resolve_job_def("train").partitions_def


def test_the_graph(definitions: dg.Definitions) -> None:
    specs = {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}
    assert {name: sorted(dep.asset_key.to_user_string() for dep in spec.deps) for name, spec in specs.items()} == GRAPH
    for name, spec in specs.items():
        assert spec.group_name in ("corpus", "dataset", "training", "evaluation", "deployment"), name
        assert spec.description, name
        assert spec.owners, name
        assert spec.kinds, name


def test_the_checks(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    blocking: dict[str, list[str]] = {}
    for key in graph.asset_check_keys:
        if graph.get_check_spec(key).blocking if hasattr(graph, "get_check_spec") else graph.get(key).blocking:
            blocking.setdefault(key.asset_key.to_user_string(), []).append(key.name)
    assert {asset: sorted(names) for asset, names in blocking.items()} == BLOCKING


def test_jobs_schedules_and_sensors(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    assert {"prepare_corpus", "train", "release"} <= {job.name for job in repository.get_all_jobs()}
    schedules = {schedule.name: (schedule.cron_schedule, schedule.default_status.value) for schedule in repository.schedule_defs}
    assert schedules == {
        "weekly_retrain": ("0 3 * * 1", "STOPPED"),
        "daily_health": ("30 2 * * *", "RUNNING"),
        "daily_retention": ("0 4 * * *", "RUNNING"),
        "weekly_report_on_monday": ("0 8 * * 1", "STOPPED"),
    }
    assert {sensor.name: sensor.default_status.value for sensor in repository.sensor_defs} == {
        "corpus_ready": "RUNNING",
        "feedback_volume": "STOPPED",
        "finished_jobs": "RUNNING",
        "model_lifecycle": "RUNNING",
        "distilled": "RUNNING",
        "enrol_tenants": "RUNNING",
        "run_failure": "RUNNING",
        "rollout_steps": "RUNNING",
        "drifted": "STOPPED",
    }


def test_loading_imports_nothing_heavy() -> None:
    code = f"import sys, finetune_assets.definitions as d; d.defs(); print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
