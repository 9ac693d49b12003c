"""The three runs of a retrain: the corpus over a range of weeks, phase one of an assistant, phase two of an assistant.

One run holds one kind of partition, so they are three. Phase two is one run, because a blocking check holds only inside its run.
"""

from __future__ import annotations

import dagster as dg

CORPUS = ("raw_conversations", "rlhf_feedback", "clean_examples")
PHASE_ONE = ("training_examples", "jsonl_splits", "training_plan", "training_job")
DISTILLATION = ("distilled_dataset",)
MIGRATION = ("training_plan", "training_job")
PHASE_TWO = ("trained_model", "benchmark_report", "registered_model", "rollout")

prepare_corpus = dg.define_asset_job(
    "prepare_corpus", selection=list(CORPUS), description="Weeks of the corpus: launch it over a range of partitions."
)
train = dg.define_asset_job(
    "train", selection=list(PHASE_ONE), description="Phase one of an assistant: data set, plan, and one training job."
)
release = dg.define_asset_job(
    "release",
    selection=list(PHASE_TWO),
    description="Phase two of an assistant: model, benchmark, version, and whether it is served.",
)

migrate = dg.define_asset_job(
    "migrate",
    selection=list(MIGRATION),
    description="A frozen data set on another trainer: tags finetune/migrate_to (TRAINER/MODEL) and finetune/dataset.",
)

distil = dg.define_asset_job(
    "distil",
    selection=list(DISTILLATION),
    description="The replies of a rented model as a training set: tags finetune/teacher, finetune/max_usd, finetune/said_since; "
    "with finetune/migrate_to (TRAINER/MODEL) the training on it follows.",
)

JOBS = [prepare_corpus, train, distil, migrate, release]
