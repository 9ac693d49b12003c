"""A version made again from what it keeps: the same spec in an empty folder, then its weights, losses and curve compared."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.dataset.manifest import read_manifest
from finetune_assets.errors import DataError, ModelUnavailable
from finetune_assets.registry import Version
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training import base_model
from finetune_assets.training.tokens import content_hash


@dataclass(frozen=True)
class Reproduction:
    """What came of it."""

    version: str
    identical: bool
    """Bit for bit: weights, and every loss of the curve."""
    farthest: float
    """Largest difference between two losses of the curve; infinite where the curves have other points."""
    changed: dict[str, tuple[Any, Any]]
    """What is different in the environment: then and now."""
    folder: Path


def reproduce(store: Store, version: Version, launch: Callable[[Path, Path], None]) -> Reproduction:
    """Trains a version again in `<home>/reproductions/<version>`. `launch(spec file, output folder)` runs the worker.

    Raises DataError where its data set is gone (an erasure says when) or its text changed, ModelUnavailable where its base model
    is another one now; a hub model is loaded by the commit that was trained on.
    """
    kept = Path(version.path)
    if not (kept / "spec.json").exists():
        raise DataError(f"{version.version} keeps no spec.json: it was not trained by this project's local trainer.")
    spec, before = read_json(kept / "spec.json"), read_json(kept / "result.json")
    dataset = store.dataset(version.assistant, version.dataset_fingerprint)
    if not dataset.exists():
        raise DataError(
            f"Data set {version.dataset_fingerprint} of {version.version} is no longer in {store.home}: restore it first."
        )
    read_manifest(dataset)
    _check_text(version.version, spec)
    now = base_model.identity(spec["base_model"])
    if now.get("id", now) != spec["base_model_identity"].get("id", spec["base_model_identity"]):  # loaded by its commit
        raise ModelUnavailable(
            f"The base model {spec['base_model']} is not the one that {version.version} was trained on (content {_short(now)}, "
            f"then {_short(spec['base_model_identity'])}). Restore the files of that model."
        )
    output = store.home / "reproductions" / version.version
    shutil.rmtree(output, ignore_errors=True)
    spec |= {name: before[name] for name in ("threads", "precision") if before.get(name)}  # of the machine that trained it
    spec |= {"nodes": 1, "rendezvous": None}  # the other machines would have to be started by hand
    spec |= {"output": str(output.resolve()), "dataset": str(dataset.resolve()), "cache": str(store.tokens.resolve())}
    write_json(output / "spec.json", spec)
    launch(output / "spec.json", output)
    after = read_json(output / "result.json")
    farthest = _farthest(kept / "training_log.jsonl", output / "training_log.jsonl")
    then, today = before.get("environment") or {}, after.get("environment") or {}
    return Reproduction(
        version=version.version,
        identical=before["model_sha256"] == after["model_sha256"] and farthest == 0,
        farthest=farthest,
        changed={key: (then.get(key), today.get(key)) for key in sorted({*then, *today}) if then.get(key) != today.get(key)},
        folder=output,
    )


def _check_text(version: str, spec: dict[str, Any]) -> None:
    """Raises DataError where the plain text that a version was trained on is gone, or is another one."""
    if not spec.get("text_sha256"):
        return
    text = Path(spec["text"])
    if not text.is_dir():
        raise DataError(f"The text of {version}, {text}, is gone: restore it first.")
    if content_hash(text) != spec["text_sha256"]:
        raise DataError(f"The files in {text} are not those that {version} was trained on: restore them first.")


def _farthest(first: Path, second: Path) -> float:
    one, other = _losses(first), _losses(second)
    if one.keys() != other.keys():
        return math.inf
    return max((abs(one[key] - other[key]) for key in one), default=0.0)


def _losses(log: Path) -> dict[tuple[int, str], float]:
    points = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {(point["step"], name): float(point[name]) for point in points for name in ("loss", "eval_loss") if name in point}


def _short(identity: dict[str, str]) -> str:
    return next(iter(identity.values()))[:12]


def export(version: Version, to: Path, *, adapter: bool = False) -> Path:
    """Copies what a server loads (weights, configuration, tokenizer, template, card) to a folder; the absolute path.

    `adapter`: the adapter alone, which names its base by its absolute path, or by its id. Raises DataError where the folder holds
    something, or the version has no adapter.
    """
    source = Path(version.path) / "adapter" if adapter else Path(version.path)
    if not source.is_dir():
        raise DataError(f"{version.version} has no adapter: it was trained with `adapter: full`. Export it without --adapter.")
    if to.exists() and any(to.iterdir()):
        raise DataError(f"{to} is not empty; name a new folder.")
    to.mkdir(parents=True, exist_ok=True)
    left_out = {"spec.json", "result.json", "training_log.jsonl", "whole.json", "card.md"}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in left_out:
            shutil.copy2(file, to / file.name)
    if adapter:  # a base that is named from the project's root would be found from there alone
        config = read_json(to / base_model.ADAPTER)
        named = base_model.resolve(config["base_model_name_or_path"])
        write_json(to / base_model.ADAPTER, {**config, "base_model_name_or_path": named})
    return to.resolve()
