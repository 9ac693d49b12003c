"""Data sets: what an assistant trains on, chosen from the corpus, split, and frozen as JSONL with its lineage."""

from finetune_assets.dataset.build import Choice, choose, freeze, load_staged, sample_rows, stage
from finetune_assets.dataset.leaks import check_leaks
from finetune_assets.dataset.manifest import Manifest, data_settings, latest, new_feedback, read_manifest

__all__ = [
    "Choice",
    "Manifest",
    "check_leaks",
    "choose",
    "data_settings",
    "freeze",
    "latest",
    "load_staged",
    "new_feedback",
    "read_manifest",
    "sample_rows",
    "stage",
]
