"""Data sets: what an assistant trains on, chosen from the corpus, split, and frozen as JSONL with its lineage."""

from finetune_assets.dataset.build import Choice, choose, freeze
from finetune_assets.dataset.leaks import check_foreign, check_leaks
from finetune_assets.dataset.manifest import Manifest, data_settings, latest, new_feedback, read_manifest
from finetune_assets.dataset.retention import prune
from finetune_assets.dataset.staging import load_staged, stage
from finetune_assets.dataset.sufficiency import check_objectives
from finetune_assets.dataset.views import by_week, sample_rows

__all__ = [
    "Choice",
    "Manifest",
    "by_week",
    "check_foreign",
    "check_leaks",
    "check_objectives",
    "choose",
    "data_settings",
    "freeze",
    "latest",
    "load_staged",
    "new_feedback",
    "prune",
    "read_manifest",
    "sample_rows",
    "stage",
]
