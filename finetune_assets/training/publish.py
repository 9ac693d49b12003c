"""From a finished job to an immutable version: what it is named after, and how its folder gets there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from finetune_assets.errors import TrainingError
from finetune_assets.storage import read_json, replacing_folder
from finetune_assets.training.base_model import folder_hash

COPIED = ("spec.json", "result.json", "training_log.jsonl")
"""What a version keeps of its job beside the model itself."""


def content_hash(model: Path, dataset_fingerprint: str) -> str:
    """sha256 over the model's files, by name and content, and the data set it was trained on."""
    names = [str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()]
    return content_hash_of(model, names, dataset_fingerprint)


def content_hash_of(folder: Path, names: Iterable[str], dataset_fingerprint: str) -> str:
    """The same over some files of a folder (names relative to it)."""
    state = hashlib.sha256(dataset_fingerprint.encode())
    for path in sorted(folder / name for name in names):
        state.update(f"\0{path.relative_to(folder)}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                state.update(block)
    return state.hexdigest()


def whole_model(job: Path) -> Path:
    """The model's folder of a finished job. Raises TrainingError where its files are not those that the training left."""
    result = read_json(job / "result.json")
    model = job / str(result.get("model") or "model")
    if result.get("model_sha256") and folder_hash(model) != result["model_sha256"]:
        raise TrainingError(
            f"The files in {model} are not those that the training left: damaged, or changed by hand. Delete "
            f"{job / 'result.json'} and materialise training_job again: it makes them anew."
        )
    return model


def publish(job: Path, version: Path) -> None:
    """Makes the version's folder from the job's `model/` and logs; one that is there stays as it is.

    Weights are hard links where the file system has them, so a version costs no second copy.
    """
    if version.exists():
        return
    with replacing_folder(version) as draft:
        shutil.copytree(job / "model", draft, dirs_exist_ok=True, copy_function=_link)
        for name in COPIED:
            if (job / name).exists():
                shutil.copy2(job / name, draft / name)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
