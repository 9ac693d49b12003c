"""What a training will take: tokens, time, memory, cost; and the budget that stops it.

Tokens are counted with the model's own tokenizer and the rendering that training uses, so the number is the one that the
finished job reports.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.errors import BudgetExceeded, SettingsError
from finetune_assets.storage import Store, read_json
from finetune_assets.training.base_model import Shape
from finetune_assets.training.encoding import Renderer, encode_example
from finetune_assets.training.prices import machine_usd
from finetune_assets.training.trainer import Estimate, TrainingRequest

START_SECONDS = 12.0
"""Imports, tokenisation and the writing of the model, on a machine like the one below."""

FLOPS_PER_CORE = {"bfloat16": 80e9, "float32": 40e9}
"""Useful floating-point operations a second and core in training, by precision, as measured with the 3M base (4,300 real tokens
per CPU-second × 6 × 3M); larger models reach more. A machine's own finished jobs replace this figure."""

RUNTIME_BYTES = 1000 * 2**20
"""Python with torch, transformers and TRL, compiled kernels and heap included (the 3M base: 1.35 GB at the peak, all told)."""

MOST_PEERS = 5


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


def count_tokens(renderer: Renderer, file: Path, max_length: int) -> TokenCount:
    """Counts the rows of a JSONL file of `messages`."""
    rows = tokens = longest = shortened = dropped = 0
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            ids, _, turns = encode_example(renderer, json.loads(line)["messages"], max_length)
            if len(ids) > max_length:
                dropped += 1
                continue
            rows += 1
            tokens += len(ids)
            longest = max(longest, len(ids))
            shortened += turns > 0 or len(ids) == max_length
    return TokenCount(rows, tokens, longest, shortened, dropped)


def estimate(
    request: TrainingRequest, count: TokenCount, shape: Shape | None, peers: list[dict[str, Any]], machine: tuple[int, str]
) -> Estimate:
    """The whole estimate. `peers`: results of finished jobs of the same model here; `machine`: threads and precision."""
    tokens = round(count.tokens * request.hyperparameters.epochs)
    seconds = estimate_seconds(tokens, shape, peers, machine)
    usd = None if seconds is None else machine_usd(seconds, request.usd_per_hour)
    return Estimate(
        tokens=tokens,
        exact=True,
        seconds=seconds,
        usd=usd,
        memory_bytes=estimate_memory(shape, request.hyperparameters.batch_size, count.longest) if shape else None,
        peers=len(peers),
    )


def estimate_seconds(tokens: int, shape: Shape | None, peers: list[dict[str, Any]], machine: tuple[int, str]) -> float | None:
    """From the median rate of earlier jobs, else from 6 operations per weight and token (Kaplan et al., arXiv:2001.08361)."""
    if peers:
        return START_SECONDS + tokens / statistics.median(float(peer["tokens_per_second"]) for peer in peers)
    if shape is None:
        return None
    threads, precision = machine
    return START_SECONDS + tokens * 6 * (shape.parameters - shape.embedding_parameters) / (threads * FLOPS_PER_CORE[precision])


def estimate_memory(shape: Shape, batch_size: int, length: int) -> int:
    """Bytes at the peak of full fine-tuning in mixed precision with AdamW.

    Weights, gradients and two moments in float32: 16 bytes a weight, and 2 for the bfloat16 copy. Activations of a layer:
    s·b·h·(34 + 5·a·s/h) bytes (Korthikanti et al., arXiv:2205.05198, equation 2), s tokens, b rows, h width, a heads. Logits:
    vocabulary × tokens, in bfloat16 and float32, with gradients: 12 bytes each.
    """
    tokens = batch_size * length
    layer = tokens * (34 * shape.hidden + 5 * shape.heads * length)
    return RUNTIME_BYTES + 18 * shape.parameters + shape.layers * layer + 12 * tokens * shape.vocabulary


def finished_peers(store: Store, identity: dict[str, str]) -> list[dict[str, Any]]:
    """Results of the newest jobs of a base model that were trained on this machine."""
    found: list[tuple[float, dict[str, Any]]] = []
    for file in store.job("x").parent.glob("*/result.json"):
        result: dict[str, Any] = read_json(file)
        if result.get("base_model_identity") == identity and result.get("host") == os.uname().nodename:
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
