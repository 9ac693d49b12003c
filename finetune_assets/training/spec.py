"""From an assistant to a training request, and from a request to the JSON spec that the worker reads.

`spec_hash` names the job's folder: it covers what decides the result. Threads and precision belong to the machine; they are
fixed in the stored spec when the job first starts and stay when it is resumed, so that it ends with the same weights. A precision
that the assistant's YAML sets, and liger, make another job.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.environment import ROOT, Environment
from finetune_assets.storage import Store, read_json
from finetune_assets.training import base_model, presets
from finetune_assets.training.machine import default_precision, free_threads
from finetune_assets.training.tokens import content_hash
from finetune_assets.training.trainer import TrainingRequest
from finetune_assets.workers import THIS_MACHINE, Workers

RECIPE = "4"
"""Version of what the worker does with a spec. Raise it when the same spec would give other weights."""

DECIDES = ("recipe", "dataset_fingerprint", "base_model_identity", "stages", "adapter", "seed", "text_sha256")
ASKED = ("precision", "liger")
"""What decides too where it was asked for; without it the hash is what it was before."""


def request_for(assistant: Assistant, dataset: Path, fingerprint: str, run_key: str = "") -> tuple[TrainingRequest, list[str]]:
    """The training of an assistant on a frozen data set, and warnings about its settings. Raises SettingsError."""
    card = base_model.card(assistant.base_model) if assistant.trainer == "local" else {}
    preset = presets.preset_name(assistant.preset, card)
    overrides = assistant.hyperparameters.model_dump()
    stages = [(name, presets.of_stage(preset, name, assistant.adapter, overrides)) for name in assistant.objective]
    main = next((values for name, values in stages if name in ("sft", "tools")), stages[0][1])
    seed = overrides["seed"]
    request = TrainingRequest(
        assistant=assistant.name,
        dataset=dataset,
        fingerprint=fingerprint,
        base_model=assistant.base_model,
        objective=tuple(assistant.objective),
        adapter=assistant.adapter,
        hyperparameters=main,
        preset=preset,
        seed=presets.DEFAULT_SEED if seed is None else int(seed),
        run_key=run_key,
        usd_per_hour=assistant.budget.usd_per_hour,
        stages=tuple(stages),
        text=_folder(assistant.text),
        precision=assistant.hyperparameters.precision,
        liger=bool(assistant.hyperparameters.liger),
        checkpoints=assistant.hyperparameters.checkpoints or TrainingRequest.checkpoints,
        report_to=Environment.read().report_to,
        overrides={key: value for key, value in overrides.items() if value is not None},
        tables=Environment.read().tables,
    )
    return request, list(dict.fromkeys(sentence for _, values in stages for sentence in presets.warnings(preset, values)))


def _folder(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text).expanduser()
    return path if path.is_absolute() else ROOT / path


def train_spec(request: TrainingRequest, store: Store, workers: Workers = THIS_MACHINE) -> dict[str, Any]:
    """The worker's spec. What an earlier start of the same job fixed (threads, precision) is taken from its folder; null where
    another machine will train, which decides then.

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
        "stages": [{"objective": name, "hyperparameters": values.to_dict()} for name, values in request.chain],
        "text": str(request.text.resolve()) if request.text else None,
        "text_sha256": content_hash(request.text) if request.text and request.text.is_dir() else None,
        "seed": request.seed,
        "asked": {name: value for name in ASKED if (value := getattr(request, name))},
    }
    spec["spec_hash"] = spec_hash(spec)
    folder = store.job(spec["spec_hash"])
    stored = read_json(folder / "spec.json") if (folder / "spec.json").exists() else {}
    return {
        **spec,
        "output": str(folder.resolve()),
        "cache": str(store.tokens.resolve()),
        "processes": workers.processes,
        "nodes": workers.nodes,
        "rendezvous": workers.rendezvous,
        "parallel": workers.parallel,
        "liger": request.liger,
        "checkpoints": request.checkpoints,
        "report_to": list(request.report_to),
        "threads": stored.get("threads") or workers.threads or (free_threads() if workers.here else None),
        "precision": request.precision or stored.get("precision") or (default_precision() if workers.here else None),
    }


def spec_hash(spec: dict[str, Any]) -> str:
    """First 16 hexadecimal digits of the sha256 of what decides the result."""
    decides = {key: spec.get(key) for key in DECIDES}
    decides["stages"] = [
        {**stage, "hyperparameters": {key: value for key, value in stage["hyperparameters"].items() if key != "log_steps"}}
        for stage in spec["stages"]
    ]
    if spec.get("asked"):
        decides["asked"] = spec["asked"]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
