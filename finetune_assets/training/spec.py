"""From an assistant to a training request, and from a request to the JSON spec that the worker reads.

`spec_hash` names the job's folder: it covers what decides the result. Threads and precision belong to the machine; they are
fixed in the stored spec when the job first starts and stay when it is resumed, so that it ends with the same weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.environment import Environment
from finetune_assets.storage import Store, read_json
from finetune_assets.training import base_model, presets
from finetune_assets.training.trainer import TrainingRequest

RECIPE = "1"
"""Version of what the worker does with a spec. Raise it when the same spec would give other weights."""

DECIDES = ("recipe", "dataset_fingerprint", "base_model_identity", "objective", "adapter", "hyperparameters", "seed")


def request_for(assistant: Assistant, dataset: Path, fingerprint: str, run_key: str = "") -> tuple[TrainingRequest, list[str]]:
    """The training of an assistant on a frozen data set, and warnings about its settings. Raises SettingsError."""
    card = base_model.card(assistant.base_model) if assistant.trainer == "local" else {}
    preset = presets.preset_name(assistant.preset, card)
    overrides = assistant.hyperparameters.model_dump()
    hyperparameters = presets.resolve(preset, overrides)
    seed = overrides["seed"]
    request = TrainingRequest(
        assistant=assistant.name,
        dataset=dataset,
        fingerprint=fingerprint,
        base_model=assistant.base_model,
        objective=tuple(assistant.objective),
        adapter=assistant.adapter,
        hyperparameters=hyperparameters,
        preset=preset,
        seed=presets.DEFAULT_SEED if seed is None else int(seed),
        run_key=run_key,
        usd_per_hour=assistant.budget.usd_per_hour,
        overrides={key: value for key, value in overrides.items() if value is not None},
        tables=Environment.read().tables,
    )
    return request, presets.warnings(preset, hyperparameters)


def train_spec(request: TrainingRequest, store: Store, threads: int | None = None) -> dict[str, Any]:
    """The worker's spec. What an earlier start of the same job fixed (threads, precision) is taken from its folder.

    Raises ModelUnavailable where the base model is neither a folder nor known to the hub.
    """
    spec: dict[str, Any] = {
        "task": "train",
        "recipe": RECIPE,
        "assistant": request.assistant,
        "dataset": str(request.dataset.resolve()),
        "dataset_fingerprint": request.fingerprint,
        "base_model": request.base_model,
        "base_model_identity": base_model.identity(request.base_model),
        "objective": list(request.objective),
        "adapter": request.adapter,
        "preset": request.preset,
        "hyperparameters": request.hyperparameters.to_dict(),
        "seed": request.seed,
    }
    spec["spec_hash"] = spec_hash(spec)
    folder = store.job(spec["spec_hash"])
    stored = read_json(folder / "spec.json") if (folder / "spec.json").exists() else {}
    return {
        **spec,
        "output": str(folder.resolve()),
        "threads": stored.get("threads") or threads or default_threads(),
        "precision": stored.get("precision") or default_precision(),
    }


def spec_hash(spec: dict[str, Any]) -> str:
    """First 16 hexadecimal digits of the sha256 of what decides the result."""
    decides = {key: spec[key] for key in DECIDES}
    decides["hyperparameters"] = {key: value for key, value in spec["hyperparameters"].items() if key != "log_steps"}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


MOST_THREADS = 8


def default_threads() -> int:
    """The cores this process may use, at most 8. The worker's threads sleep while they wait, so a busy core costs little."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_THREADS)


def default_precision() -> str:
    """`bfloat16` where the CPU multiplies it natively (AVX512-BF16, AMX: twice as fast), else `float32`; a GPU decides itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        flags = ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
