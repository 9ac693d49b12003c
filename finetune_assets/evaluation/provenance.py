"""What a report tells of a model beside its measures: its files and settings, and how its training went."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.evaluation.candidates import FEW_SHOT
from finetune_assets.evaluation.measures import personal_data

CURVE_POINTS = 200
KEPT = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib")


def curve(path: Path | None) -> list[dict[str, float]]:
    """Points of the training log with loss or eval_loss, what is KEPT of them, thinned to CURVE_POINTS; empty without a log."""
    if path is None or not path.exists():
        return []
    points: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line) if line.strip() else {}
        kept = {k: float(entry[k]) for k in KEPT if isinstance(entry.get(k), int | float)}
        if "step" in kept and ("loss" in kept or "eval_loss" in kept):
            points.append(kept)
    step = -(-len(points) // CURVE_POINTS) or 1
    return [point for n, point in enumerate(points) if n % step == 0 or n == len(points) - 1 or "eval_loss" in point]


def model_facts(
    name: str, facts: Mapping[str, Any], frame: pl.DataFrame, shots: int, contacts: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """One candidate's model, how it was asked, and what is missing of its rows. `shots`: how many examples there were."""
    replies = [reply for reply in frame["reply"].to_list() if reply is not None]
    causes = Counter(str(cause) for cause in frame["missing"].to_list() if cause is not None)
    known = ("model", "url", "identity", "context", "max_new_tokens", "retrieval", "canaries")
    return {
        **{key: facts.get(key) for key in known},
        "shots": (facts.get("shots") or {}).get("k", shots) if name == FEW_SHOT else 0,
        "shots_chosen": facts.get("shots"),
        "prompts_cut": round(float((frame["dropped_turns"] > 0).mean() or 0.0), 6),  # pyright: ignore[reportArgumentType]
        "without_likelihood": int(frame["nll"].null_count()) if "url" not in facts else 0,
        "missing": dict(causes.most_common()),
        "personal_data": dict(sum((personal_data(reply, contacts) for reply in replies), start=Counter[str]())),
        "reply_tokens_mean": _mean(frame["reply_tokens"]),
        "prompt_tokens_mean": _mean(frame["prompt_tokens"]),
    }


def _mean(column: pl.Series) -> float | None:
    value = column.mean()
    return round(float(value), 2) if isinstance(value, int | float) else None
