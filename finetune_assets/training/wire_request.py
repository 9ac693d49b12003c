"""What a provider that speaks OpenAI's API is asked for: sources of its files, hyper-parameters, and the body of a job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_assets.errors import TrainingError
from finetune_assets.training.remote import Connection
from finetune_assets.training.trainer import TrainingRequest
from finetune_assets.training.wire_profiles import PROFILES

DPO = ("dpo",)


def sources(request: TrainingRequest) -> dict[str, Path]:
    """Files of the frozen data set, by their role at the provider."""
    names = ("preferences", "preferences_heldout") if request.objective == DPO else ("train", "validation")
    return {role: request.dataset / f"{name}.jsonl" for role, name in zip(("training", "validation"), names, strict=True)}


def parameters(connection: Connection, request: TrainingRequest) -> dict[str, Any]:
    """The hyper-parameters as a provider takes them. Raises TrainingError for what it does not."""
    provider, profile, values = connection.provider, PROFILES[connection.provider], request.hyperparameters
    if request.objective not in (("sft",), DPO) or (request.objective == DPO and not profile.dpo):
        can = "[sft] or [dpo]" if profile.dpo else "[sft]"
        raise TrainingError(f"{provider} trains the objective {can}, not {list(request.objective)}; train a chain locally.")
    if values.epochs != int(values.epochs) or not 1 <= values.epochs <= 50:
        raise TrainingError(f"{provider} takes 1 to 50 whole epochs, hyperparameters.epochs is {values.epochs:g}.")
    batch, beta = request.overrides.get("batch_size"), request.overrides.get("beta")
    if batch is not None and not 1 <= batch <= 256:
        raise TrainingError(f"{provider} takes a batch of 1 to 256, hyperparameters.batch_size is {batch}.")
    if request.objective == DPO and beta is not None and not 0 < beta <= 2:
        raise TrainingError(f"{provider} takes a beta above 0 and up to 2, hyperparameters.beta is {beta:g}.")
    sent: dict[str, Any] = {"n_epochs": int(values.epochs)}
    if profile.absolute_rate:
        length = _context(values.max_length)
        sent |= {"batch_size": values.batch_size, "learning_rate": values.learning_rate, "context_length": length}
        return sent | ({"lora": True, "lora_r": 8, "lora_alpha": 32} if request.adapter == "lora" else {"lora": False})
    rate = connection.options.get("learning_rate_multiplier", 1.0)
    sent |= {"batch_size": batch or "auto", "learning_rate_multiplier": rate}
    return sent | ({"beta": beta} if request.objective == DPO and beta is not None else {})


def body(connection: Connection, request: TrainingRequest, state: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `fine_tuning.jobs.create`; `state`: the journal, with the uploaded files and the suffix."""
    profile, sent = PROFILES[connection.provider], parameters(connection, request)
    made: dict[str, Any] = {"model": request.base_model, "training_file": state["training_file"]}
    made |= {"suffix": state["suffix"], "seed": request.seed}
    if state.get("validation_file"):
        made["validation_file"] = state["validation_file"]
    if profile.absolute_rate:
        made["extra_body"] = {"hyperparameters": sent}
    else:
        method = "dpo" if request.objective == DPO else "supervised"
        made["method"] = {"type": method, method: {"hyperparameters": sent}}
    if profile.metadata:
        made["metadata"] = {"run_key": request.run_key, "fingerprint": request.fingerprint, "assistant": request.assistant}
    if connection.provider == "azure" and connection.options.get("training_type"):
        made["extra_body"] = {"trainingType": connection.options["training_type"]}
    return made


def _context(max_length: int) -> int:
    """Nebius takes 8192 tokens of context or a larger power of two."""
    length = 8192
    while length < max_length:
        length *= 2
    return length
