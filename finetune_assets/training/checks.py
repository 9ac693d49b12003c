"""What cannot be trained on this machine, found before anything is spent; each refusal says what to do instead."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace

import jinja2

from finetune_assets.errors import DataError, ModelUnavailable, SettingsError, TrainingError
from finetune_assets.storage import Store
from finetune_assets.training import base_model, machine, plan
from finetune_assets.training.base_model import Shape
from finetune_assets.training.encoding import LightRenderer
from finetune_assets.training.presets import OBJECTIVES, PREFERENCES
from finetune_assets.training.tokens import text_files
from finetune_assets.training.trainer import TrainingRequest
from finetune_assets.workers import THIS_MACHINE, Workers

NEEDS = {"sft": "train.jsonl", "tools": "train.jsonl", "dpo": "preferences.jsonl", "kto": "kto.jsonl"}
MENDS = {
    "sft": "There is nothing to train on. Materialise jsonl_splits again.",
    "tools": "There is nothing to train on. Materialise jsonl_splits again.",
    "dpo": "Preferences come from corrected replies: collect corrections, or take dpo out of `objective`.",
    "kto": "Rated replies come from thumbs up and down: collect feedback, or take kto out of `objective`.",
}
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio", "comet_ml", "clearml", "swanlab", "codecarbon", "dvclive")
"""What transformers' Trainer reports to, by the name of the package too."""
SHORTEST = 64
"""Tokens of a row for which memory must suffice at least; recoveries make the micro-batch smaller, not the rows."""


def check_request(request: TrainingRequest, store: Store, workers: Workers | None = THIS_MACHINE) -> None:
    """Raises SettingsError, DataError, ModelUnavailable or TrainingError. `workers`: None where a provider's machine trains."""
    _check_objectives(request)
    if workers is not None:
        check_processes(request, workers)
    if workers is not None and workers.here:
        _check_hardware(request)
    base_model.identity(request.base_model)
    _check_files(request.base_model)
    _check_adapter(request.base_model)
    _check_tokenizer(request.base_model)
    shape = base_model.shape(request.base_model)
    if shape is not None:
        _check_disk(request, store, shape)
        if workers is not None and workers.here:  # another machine's memory is not known: the worker there recovers, or fails
            _check_memory(request, shape, workers)


def _check_objectives(request: TrainingRequest) -> None:
    for objective, values in request.chain:
        if objective not in OBJECTIVES:
            raise TrainingError(f"objective {objective!r} cannot be trained here; {', '.join(OBJECTIVES)} can.")
        if objective == "continued_pretraining":
            if request.text is None or not request.text.is_dir() or not text_files(request.text):
                raise DataError(
                    f"`text: {request.text}` holds no .txt or .md file, and continued_pretraining reads nothing else. Name the "
                    "folder of the plain text, or take continued_pretraining out of `objective`."
                )
            continue
        file = request.dataset / NEEDS[objective]
        if not file.exists() or file.stat().st_size == 0:
            raise DataError(f"{file} is missing or empty, and objective `{objective}` needs it. {MENDS[objective]}")
        if objective == "tools" and not any(mark in file.read_text(encoding="utf-8") for mark in ('"tools"', "tool_calls")):
            raise DataError(
                f"No row of {file} calls a tool, which objective `tools` trains. Import conversations with tool calls, or set "
                "`objective: [sft]`."
            )
        if objective == "kto" and values.batch_size < 2:
            raise SettingsError(
                f"batch_size is {values.batch_size}, and kto compares the rows of a batch: set hyperparameters.batch_size to 2 "
                "or more, or hyperparameters.by_objective.kto.batch_size."
            )


def _check_hardware(request: TrainingRequest) -> None:
    if request.adapter not in ("full", "lora", "qlora"):
        raise SettingsError(f"adapter {request.adapter!r} is unknown; allowed: full, lora, qlora.")
    if request.adapter == "qlora" and not (machine.has_gpu() and machine.has_package("bitsandbytes")):
        missing = "no NVIDIA GPU" if not machine.has_gpu() else "bitsandbytes is not installed"
        raise TrainingError(
            f"adapter `qlora` cannot be trained here: {missing}. Set `adapter: lora`, or train on a machine with an NVIDIA GPU "
            "and `pip install 'finetune-assets[qlora]'`."
        )
    if request.liger and not (machine.has_gpu() and machine.has_package("liger_kernel")):
        missing = "there is no NVIDIA GPU" if not machine.has_gpu() else "the package liger-kernel is not installed"
        raise TrainingError(
            f"hyperparameters.liger is true, but {missing}. Remove the setting, or train on a machine with an NVIDIA GPU and "
            "`pip install 'finetune-assets[liger]'`."
        )
    check_trackers(request.report_to)
    if request.precision == "bfloat16" and not machine.multiplies_bfloat16():
        missing = (
            f"this GPU (compute capability {min(card.capability for card in machine.cards()):g}) has none before "
            f"{machine.BFLOAT16_FROM:g}"
            if machine.has_gpu()
            else "this processor has none (AVX512-BF16 or AMX), and there is no GPU"
        )
        raise TrainingError(
            f"hyperparameters.precision is bfloat16, which wants instructions of its own: {missing}. Remove the setting: float32 "
            "is faster here."
        )


def check_trackers(names: Sequence[str]) -> None:
    """Raises SettingsError for a tracker that is unknown, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise SettingsError(f"FINETUNE_REPORT_TO={name!r} is unknown; allowed: {', '.join(TRACKERS)}.")
        if not machine.has_package(name):
            raise SettingsError(
                f"FINETUNE_REPORT_TO={name} needs the package {name.replace('_', '-')}: pip install {name.replace('_', '-')}."
            )


def check_processes(request: TrainingRequest, workers: Workers) -> None:
    """Raises SettingsError where a training cannot be divided among so many processes."""
    processes = workers.together
    if processes == 1:
        return
    places = (machine.gpus(), "GPUs") if machine.has_gpu() else (machine.cores(), "cores")
    if workers.here and workers.processes > places[0]:
        raise SettingsError(
            f"FINETUNE_PROCESSES is {workers.processes}, this machine has {places[0]} {places[1]}: set at most as many."
        )
    if workers.parallel == "fsdp" and request.adapter == "qlora":
        raise SettingsError(
            "adapter `qlora` cannot be divided among processes, since its base is in 4 bits: set FINETUNE_PARALLEL=ddp, or "
            "`adapter: lora`."
        )
    for objective, values in request.chain:
        if objective in PREFERENCES:
            raise SettingsError(
                f"objective `{objective}` trains in one process: set FINETUNE_PROCESSES=1 and FINETUNE_NODES=1, or take it out "
                "of `objective`."
            )
        if values.batch_size % processes:
            raise SettingsError(
                f"batch_size {values.batch_size} of `{objective}` cannot be divided among {processes} processes: set "
                f"hyperparameters.batch_size to a multiple of {processes}, or another FINETUNE_PROCESSES."
            )


def _check_files(model: str) -> None:
    """Weights are there, and whole. Raises ModelUnavailable."""
    missing = base_model.unfinished(model)
    if missing:
        raise ModelUnavailable(
            f"base_model {model!r}: {missing}. Fetch the model's files again (`git lfs pull` in a clone), or name another folder."
        )


def _check_adapter(model: str) -> None:
    """A base model that is an adapter must be one of the base that it names. Raises ModelUnavailable."""
    where = base_model.folder(model)
    base = base_model.adapted(where) if where else None
    under = base_model.folder(base) if base else None
    wrong = base_model.misfit(where, under) if where and under else None
    if wrong:
        raise ModelUnavailable(
            f"The adapter in {where} does not belong to {base} ({wrong}): another size or another vocabulary. Correct "
            f"base_model_name_or_path in its {base_model.ADAPTER}, or train the adapter again."
        )


def _check_tokenizer(model: str) -> None:
    """Where the tokenizer's file is here. Raises ModelUnavailable without end token, or for one of another model."""
    where, shape = base_model.folder(model), base_model.shape(model)
    if where is None or not (where / "tokenizer.json").exists() or shape is None:
        return  # the worker checks what it downloads
    try:
        tokens = LightRenderer(where).vocabulary
    except jinja2.TemplateError:
        return  # a template that needs more than plain jinja2, or none at all: the worker tells when it counts
    if shape.vocabulary and tokens > shape.vocabulary:
        raise ModelUnavailable(
            f"The tokenizer of {model} has {tokens} tokens, the model embeds {shape.vocabulary}: they do not belong together. "
            "Give a folder with both from the same model."
        )


def _check_disk(request: TrainingRequest, store: Store, shape: Shape) -> None:
    store.home.mkdir(parents=True, exist_ok=True)
    needed, free = plan.disk_bytes(shape, request), shutil.disk_usage(store.home).free
    if needed > free:
        raise TrainingError(
            f"{request.base_model} needs about {needed / 1e9:.1f} GB for checkpoints and models, {store.home} has "
            f"{free / 1e9:.1f} GB free. Make room, set FINETUNE_HOME to a larger disk, or set `adapter: lora`."
        )


def _check_memory(request: TrainingRequest, shape: Shape, workers: Workers) -> None:
    """What one short row takes beside the weights, in each process: on a GPU of its own, or all of them in main memory."""
    gpu, has = machine.has_gpu(), machine.room()
    if has is None:
        return
    smallest = replace(request.hyperparameters, batch_size=1)
    each = plan.process_memory(shape, (request.chain[0][0], smallest), SHORTEST, request.adapter, workers)
    processes = 1 if gpu else workers.processes
    if each * processes > has:
        raise TrainingError(
            f"{request.base_model} with adapter `{request.adapter}` needs about {each * processes / 2**30:.1f} GiB of memory for "
            f"one short row{f' in each of {processes} processes' if processes > 1 else ''}, "
            f"{'the largest GPU here' if gpu else 'this machine'} has {has / 2**30:.1f}. Take a smaller base_model, "
            + ("set `adapter: lora`, " if request.adapter == "full" else "")
            + ("set FINETUNE_PROCESSES=1, " if processes > 1 else "")
            + f"or a larger {'card' if gpu else 'machine'}."
        )
