"""What a training will take: tokens, time, memory, cost; and the budget that stops it.

Tokens are counted with the model's own tokenizer and the rendering that training uses, so the number is the one that the
finished job reports.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import BudgetExceeded, SettingsError
from finetune_assets.storage import Store, read_json
from finetune_assets.training.base_model import Shape
from finetune_assets.training.machine import has_gpu
from finetune_assets.training.presets import Hyperparameters
from finetune_assets.training.prices import machine_usd
from finetune_assets.training.tokens import Rows
from finetune_assets.training.trainer import Estimate, TrainingRequest
from finetune_assets.workers import THIS_MACHINE, Workers

START_SECONDS = 12.0
"""Imports, tokenisation and the writing of the model, on a machine like the one below; finished jobs tell their own."""

FLOPS_PER_CORE = {"bfloat16": 80e9, "float32": 40e9}
"""Useful floating-point operations a second and core in training, by precision, as measured with the 3M base (4,300 real tokens
per CPU-second × 6 × 3M); larger models reach more. A machine's own finished jobs replace this figure."""

RUNTIME_BYTES = 1000 * 2**20
"""Python with torch, transformers and TRL, compiled kernels and heap included (the 3M base: 1.35 GB at the peak, all told)."""

SCORES_LENGTH = 1024
"""`worker.attention.LENGTH`"""
LOGITS = 2**28
"""`worker.targets.LOGITS`"""

MOST_PEERS = 5

PROBE_ABOVE_SECONDS = 900.0
"""A longer training is probed by ten steps before it is planned, unless a finished job tells already."""


@dataclass(frozen=True)
class TokenCount:
    """What the training rows amount to."""

    rows: int
    """Rows that will be trained."""
    tokens: int
    """Their tokens, once over, prompts included."""
    longest: int
    """Tokens of the longest row."""
    shortened: int
    """Rows that lose turns or the beginning of their prompt to fit."""
    dropped: int
    """Rows whose reply leaves no room for a prompt."""


def counted(rows: Rows) -> TokenCount:
    """The count of tokenised rows."""
    return TokenCount(len(rows.examples), rows.tokens, max(rows.lengths, default=0), rows.shortened, rows.dropped)


Measured = Mapping[str, Any]
"""`tokens_per_second` and `memory_bytes` of a finished job (also `seconds` of its loop, and `wall_seconds` of it whole), or of a
probe, which tells of the first stage."""


def estimate(
    request: TrainingRequest,
    counts: Sequence[TokenCount],
    shape: Shape | None,
    measured: Sequence[Measured],
    machine: tuple[int, str],
    workers: Workers = THIS_MACHINE,
) -> Estimate:
    """The whole estimate. `counts`: of each stage; `measured`: finished jobs of the same model, objectives, adapter and processes
    here, or a probe; `machine`: threads (of all machines) and precision.
    """
    stages = list(zip(request.chain, counts, strict=True))
    sizes = [round(count.tokens * values.epochs) for (_, values), count in stages]
    tokens, probed = sum(sizes), any("probe" in one for one in measured)
    peaks = [int(one["memory_bytes"]) for one in measured if one.get("memory_bytes")]
    seconds: float | None = None
    memory = max(peaks, default=None)
    if measured:
        loop = tokens / statistics.median(float(one["tokens_per_second"]) for one in measured)
        around = [float(one["wall_seconds"]) - float(one["seconds"]) for one in measured if "wall_seconds" in one]
        seconds = (statistics.median(around) if around else START_SECONDS) + loop
    if shape is not None:
        parts = [
            stage_seconds(size, shape, (name, request.adapter), machine)
            for size, (name, _) in zip(sizes, request.chain, strict=True)
        ]
        copy = 0 if has_gpu() else checkpoint_memory(shape, request.hyperparameters, request.adapter)
        held = [process_memory(shape, stage, count.longest, request.adapter, workers) + copy for stage, count in stages]
        if not measured:
            seconds = START_SECONDS + sum(parts)
        elif probed:  # of the first stage: the others as the formula has them beside it
            rate = float(measured[0]["tokens_per_second"])
            seconds = START_SECONDS + sizes[0] / rate * sum(parts) / max(parts[0], 1e-9)
            memory = None if memory is None else round(memory * max(held) / held[0])
        if memory is None:  # a GPU's checkpoints are copied to main memory, which is not what is short
            memory = max(held)
    return Estimate(
        tokens=tokens,
        exact=True,
        seconds=seconds,
        usd=None if seconds is None else machine_usd(seconds, request.usd_per_hour),
        memory_bytes=memory,
        peers=sum("probe" not in one for one in measured),
        probed=probed,
        rows_shortened=sum(count.shortened for count in counts),
        rows_left_out=sum(count.dropped for count in counts),
    )


OPERATIONS = {"full": 6.0, "lora": 4.0, "qlora": 4.0}
"""Floating-point operations for each weight and token, forward and backward (Kaplan et al., arXiv:2001.08361). An adapter's base
needs no gradients of its weights: 2 of the 6."""
REFERENCE_SHARE = {"dpo": 1 / 3, "kto": 1.0}
"""Forward passes of a preference stage beside the training's own: dpo's reference; kto's reference and estimate of the KL term,
each on as many rows again."""


def stage_seconds(tokens: int, shape: Shape, what: tuple[str, str], machine: tuple[int, str]) -> float:
    """Seconds of one stage (`what`: objective and adapter) by the number of weights."""
    objective, adapter = what
    threads, precision = machine
    operations = OPERATIONS[adapter] * (shape.parameters - shape.embedding_parameters) * (1 + REFERENCE_SHARE.get(objective, 0.0))
    return tokens * operations / (threads * FLOPS_PER_CORE[precision])


def estimate_memory(
    shape: Shape, values: Hyperparameters, length: int, adapter: str = "full", objective: str = "sft", *, gpu: bool = False
) -> int:
    """Bytes at the peak of training in mixed precision with AdamW; beside it `checkpoint_memory` where checkpoints are copied.

    All weights: weights, gradients and two moments in float32, 16 bytes a weight, and 2 for the bfloat16 copy. With an adapter
    the base needs 4 and 2 (in 4 bits: 0.55, with its scales), the adapter 16. Activations of a layer: s·b·h·(34 + 5·a·s/h) bytes
    (Korthikanti et al., arXiv:2205.05198, equation 2), s tokens, b rows, h width, a heads; the second part, the scores, only
    where attention keeps them (`worker.attention`: short rows on a CPU). Logits: vocabulary × tokens, in bfloat16 and float32,
    with gradients: 12 bytes each; beyond LOGITS they are made in chunks. dpo has two rows for each pair. `gpu`: of a GPU, whose
    memory holds no Python. Never held against one: there was none.
    """
    tokens = values.batch_size * length * (2 if objective == "dpo" else 1)
    scores = 0 if gpu or length > SCORES_LENGTH else 5 * shape.heads * length
    layers = shape.layers * tokens * (34 * shape.hidden + scores)
    logits = 12 * min(tokens * shape.vocabulary, LOGITS)
    return int((0 if gpu else RUNTIME_BYTES) + weights_memory(shape, values, adapter) + layers + logits)


def weights_memory(shape: Shape, values: Hyperparameters, adapter: str) -> float:
    """Bytes of weights, gradients and moments, the first part of `estimate_memory`."""
    if adapter == "full":
        return 18.0 * shape.parameters
    return {"lora": 6.0, "qlora": 0.55}[adapter] * shape.parameters + 16 * adapter_parameters(shape, values.lora_rank)


def process_memory(shape: Shape, stage: tuple[str, Hyperparameters], length: int, adapter: str, workers: Workers) -> int:
    """Bytes at the peak of each process of a stage (objective and values), which divide its batch.

    With `ddp` each holds all of the weights, and its gradients a second time, in the buckets that are exchanged (two processes of
    a CPU took a fifth less than that, 27M weights). With `fsdp` each holds its part, after it has read the whole model.
    """
    objective, values = stage
    processes, gpu = workers.together, has_gpu()
    own = replace(values, batch_size=max(1, values.batch_size // processes))
    memory = estimate_memory(shape, own, length, adapter, objective, gpu=gpu)
    if processes == 1:
        return memory
    if workers.parallel == "ddp":
        return memory + 4 * trained_parameters(shape, values, adapter)
    divided = memory - int(weights_memory(shape, values, adapter) * (1 - 1 / processes))
    return divided if gpu else max(divided, RUNTIME_BYTES + 4 * shape.parameters)


def checkpoint_memory(shape: Shape, values: Hyperparameters, adapter: str) -> int:
    """Bytes of main memory while a checkpoint is written beside the training: a copy of weights and moments, 12 bytes a trained
    weight. Without room for it the training waits for each checkpoint instead.
    """
    return 12 * trained_parameters(shape, values, adapter)


def trained_parameters(shape: Shape, values: Hyperparameters, adapter: str) -> int:
    """Weights that the optimiser moves."""
    return shape.parameters if adapter == "full" else adapter_parameters(shape, values.lora_rank)


def adapter_parameters(shape: Shape, rank: int) -> int:
    """Weights of an adapter on every linear layer: about 18 times rank times width a layer (attention 8, feed-forward 10)."""
    return 18 * rank * shape.hidden * shape.layers


def disk_bytes(shape: Shape, request: TrainingRequest) -> int:
    """Bytes that a job has on disk at most: the checkpoints that are kept and one more (weights and two moments, float32), the
    best weights of each stage and those that replace them, the model.
    """
    trained = trained_parameters(shape, request.hyperparameters, request.adapter)
    return 12 * (request.checkpoints + 1) * trained + 4 * trained * (1 + len(request.chain)) + 4 * shape.parameters


def worth_a_probe(estimated: Estimate) -> bool:
    """Whether ten steps are worth their time: nothing is measured yet, and the training is long beside them."""
    return not estimated.peers and estimated.seconds is not None and estimated.seconds > PROBE_ABOVE_SECONDS


def finished_peers(
    store: Store, identity: dict[str, str], request: TrainingRequest, workers: Workers = THIS_MACHINE
) -> list[dict[str, Any]]:
    """Results of the newest jobs of the same base model, objectives, adapter, batch and processes that ran on this machine."""
    alike = {
        "base_model_identity": identity,
        "host": os.uname().nodename,
        "objective": [name for name, _ in request.chain],
        "adapter": request.adapter,
    }
    divided = (workers.together, workers.parallel if workers.together > 1 else None)
    sizes = (request.hyperparameters.batch_size, request.hyperparameters.max_length)
    found: list[tuple[float, dict[str, Any]]] = []
    for file in store.job("x").parent.glob("*/result.json"):
        result: dict[str, Any] = read_json(file)
        known = result.get("hyperparameters") or {}
        same_size = (known.get("batch_size"), known.get("max_length")) == sizes
        same_division = (result.get("processes", 1), result.get("parallel")) == divided
        if same_size and same_division and all(result.get(key) == value for key, value in alike.items()):
            found.append((file.stat().st_mtime, result))
    return [result for _, result in sorted(found, key=lambda pair: pair[0], reverse=True)[:MOST_PEERS]]


def check_budget(assistant: Assistant, estimated: Estimate) -> None:
    """Raises BudgetExceeded where the estimate is above the assistant's budget, SettingsError where it cannot be priced."""
    budget = assistant.budget
    if budget.training_usd is not None:
        if estimated.usd is None:
            raise SettingsError(
                f"{assistant.name}: budget.training_usd is {budget.training_usd:g}, but nothing says what training costs. "
                "Set budget.usd_per_hour (0 for a machine that is paid anyway), or remove budget.training_usd."
            )
        if estimated.usd > budget.training_usd:
            raise BudgetExceeded(
                f"{assistant.name}: the training would cost about ${_cents(estimated.usd)}, the limit is "
                f"${_cents(budget.training_usd)}. Raise budget.training_usd, or lower hyperparameters.epochs or window_weeks."
            )
    if budget.hours is not None:
        if estimated.seconds is None:
            raise SettingsError(
                f"{assistant.name}: budget.hours is {budget.hours:g}, but the time cannot be estimated before the base model is "
                "on this machine. Download it once, or remove budget.hours."
            )
        if estimated.seconds > budget.hours * 3600:
            raise BudgetExceeded(
                f"{assistant.name}: the training would take about {estimated.seconds / 3600:.2g} hours, the limit is "
                f"{budget.hours:g}. Raise budget.hours, or lower hyperparameters.epochs or window_weeks."
            )


def _cents(usd: float) -> str:
    """Two decimals, more where the amount is below a cent."""
    return f"{usd:.2f}" if usd == 0 or usd >= 0.01 else f"{usd:.{-math.floor(math.log10(usd)) + 1}f}"
