"""What `dpo` and `kto` need beside TRL: rows, log-probabilities of the model they start from, and what came of it.

The reference is the model that the stage starts from. Its log-probabilities are computed once and kept in
`<stage>/reference.json`, so no second model is in memory and a resumed stage compares with the same numbers.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_assets.storage import read_json, write_json
from finetune_assets.training.tokens import Row, Rows
from finetune_assets.worker.generate import batches, logit_tokens
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.rows import LengthGrouped

RESAMPLES = 2_000
LEVEL = 0.95
Sequences = list[tuple[list[int], int]]
"""Ids, and where the completion begins in them."""


def sequences(objective: str, examples: Sequence[Row]) -> dict[str, Sequences]:
    """The sequences that TRL wants a reference for, by the column that holds it."""
    columns = (
        {"ref_chosen_logps": "chosen_ids", "ref_rejected_logps": "rejected_ids"}
        if objective == "dpo"
        else {"ref_logps": "completion_ids", "ref_KL_logps": "KL_completion_ids"}
    )
    return {
        name: [(row["prompt_ids"] + row[completion], len(row["prompt_ids"])) for row in examples]
        for name, completion in columns.items()
    }


def arranged(objective: str, rows: Rows, batch_size: int, seed: int, max_length: int) -> Rows:
    """KTO rows in their batches, each with the completion of its neighbour there, by which TRL estimates the KL term."""
    if objective != "kto":
        return rows
    ordered = [rows.examples[index] for index in LengthGrouped(rows.lengths, batch_size, seed)]
    made: list[Row] = []
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        for row, neighbour in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            room = max(1, max_length - len(row["prompt_ids"]))
            made.append({**row, "KL_completion_ids": neighbour["completion_ids"][:room]})
    return Rows(made, rows.shortened, rows.dropped)


def with_reference(objective: str, rows: Rows, values: dict[str, list[float]]) -> Rows:
    """The rows with their reference columns."""
    columns = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    return Rows([{**row, **more} for row, more in zip(rows.examples, columns, strict=True)], rows.shortened, rows.dropped)


def reference(
    file: Path, model: Any, parts: dict[str, tuple[str, Rows]], bf16: bool, progress: Progress
) -> dict[str, dict[str, list[float]]]:
    """Log-probabilities by part (train, heldout) and column, computed where `file` does not hold them."""
    if file.exists():
        return read_json(file)
    made = {
        part: {name: log_probs(model, found, bf16) for name, found in sequences(objective, rows.examples).items()}
        for part, (objective, rows) in parts.items()
    }
    write_json(file, made)
    progress.note(f"Reference computed for {sum(len(rows.examples) for _, rows in parts.values()):,} rows.")
    return made


@torch.no_grad()
def log_probs(model: Any, found: Sequences, bf16: bool) -> list[float]:
    """Sum of the log-probabilities of each completion, in nats; in the precision that training uses."""
    was_training, device = model.training, model.device
    model.eval()
    sums = [0.0] * len(found)
    vocabulary = int(model.config.get_text_config().vocab_size)
    for batch in batches([len(ids) for ids, _ in found], tokens=logit_tokens(vocabulary)):
        width = max(len(found[index][0]) for index in batch)
        ids = torch.tensor([found[index][0] + [0] * (width - len(found[index][0])) for index in batch], device=device)
        real = torch.tensor([[1] * len(found[i][0]) + [0] * (width - len(found[i][0])) for i in batch], device=device)
        target = torch.tensor(
            [[0] * found[i][1] + [1] * (len(found[i][0]) - found[i][1]) + [0] * (width - len(found[i][0])) for i in batch],
            device=device,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
        for index, value in zip(batch, (-(losses.double() * target[:, 1:]).sum(dim=1)).tolist(), strict=True):
            sums[index] = value
    model.train(was_training)
    return sums


def judged(
    objective: str, rows: Rows, before: dict[str, list[float]], after: dict[str, list[float]], beta: float
) -> dict[str, Any]:
    """What the stage did to rows that it never saw: how well rewards tell good from bad, and how likely good replies still are.

    Reward: beta times the change of the log-probability. `reward_accuracy`: for dpo the share of pairs whose chosen reply has the
    higher reward, for kto the probability that a good reply has a higher reward than a bad one; ties count half.
    `good_nats_per_token` of chosen or good replies. Intervals: percentile bootstrap over rows.
    """
    rewards = {name: beta * (np.array(after[name]) - np.array(before[name])) for name in before}
    if objective == "dpo":
        good, bad = rewards["ref_chosen_logps"], rewards["ref_rejected_logps"]
        length = np.array([len(row["chosen_ids"]) for row in rows.examples])
        then, now = np.array(before["ref_chosen_logps"]), np.array(after["ref_chosen_logps"])
        draws = _draws(len(good))
        accuracy = _interval(_above(good - bad), lambda: _above((good - bad)[draws]).mean(axis=1))
        margin = _interval(good - bad, lambda: (good - bad)[draws].mean(axis=1))
    else:
        label = np.array([bool(row["label"]) for row in rows.examples])
        good, bad = rewards["ref_logps"][label], rewards["ref_logps"][~label]
        length = np.array([len(row["completion_ids"]) for row in rows.examples])[label]
        then, now = np.array(before["ref_logps"])[label], np.array(after["ref_logps"])[label]
        draws = _draws(len(good))
        pairs = _above(good[:, None] - bad[None, :])
        other = _draws(len(bad))
        accuracy = _interval(pairs, lambda: np.array([pairs[np.ix_(a, b)].mean() for a, b in zip(draws, other, strict=True)]))
        gap = good.mean() - bad.mean() if len(good) and len(bad) else np.nan
        margin = _interval(np.array([gap]), lambda: good[draws].mean(axis=1) - bad[other].mean(axis=1))
    total = max(int(length.sum()), 1)
    change = _interval(
        np.array([(then.sum() - now.sum()) / total]),
        lambda: (then - now)[draws].sum(axis=1) / np.maximum(length[draws].sum(axis=1), 1),
    )
    return {
        "rows": len(rows.examples),
        "good": len(good),
        "bad": len(bad),
        "reward_accuracy": accuracy,
        "reward_margin": margin,
        "good_nats_per_token": {"before": float(-then.sum() / total), "after": float(-now.sum() / total), "change": change},
        "likelihood_fell": bool(change["low"] is not None and change["low"] > 0),
    }


def _above(difference: Any) -> Any:
    return (difference > 0) + 0.5 * (difference == 0)


def _draws(rows: int) -> Any:
    """Row numbers of each resample, the same for the same number of rows."""
    return np.random.default_rng(0).integers(0, max(rows, 1), (RESAMPLES, max(rows, 1)))


def _interval(values: Any, resampled: Any) -> dict[str, float | None]:
    """The mean and its interval; all null without values."""
    if values.size == 0 or not np.isfinite(values).all():
        return {"value": None, "low": None, "high": None}
    low, high = np.quantile(resampled(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
