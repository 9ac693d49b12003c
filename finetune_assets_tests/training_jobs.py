"""Specs, data and curves of training jobs, for the tests that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_assets.training import base_model, presets
from finetune_assets.training.spec import spec_hash
from finetune_assets_tests.tiny_model import dialogues

Chat = list[dict[str, Any]]


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_rows(file: Path, chats: list[Chat]) -> None:
    """Rows of `messages`."""
    write_lines(file, [{"messages": chat} for chat in chats])


def preferences(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs whose rejected reply is curt and whose chosen one is not: a rule that a small model can learn."""
    return [
        {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [{"role": "assistant", "content": "No sé. Llame más tarde."}]}
        for chat in dialogues(rows, seed=seed)
    ]


def thumbs(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same as single rows, good and bad in turns."""
    return [
        {"prompt": pair["prompt"], "completion": pair["rejected" if at % 2 else "chosen"], "label": at % 2 == 0}
        for at, pair in enumerate(preferences(rows, seed))
    ]


def make_spec(output: Path, base: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """A spec of the `tiny` preset, two epochs. `objective`: a list; `hyperparameters`: overrides; the rest replaces keys."""
    overrides = {"epochs": 2, "max_length": 256, **changes.pop("hyperparameters", {})}
    objectives, adapter = changes.pop("objective", ["sft"]), changes.get("adapter", "full")
    stages = [
        {"objective": name, "hyperparameters": {**presets.of_stage("tiny", name, adapter, overrides).to_dict(), "log_steps": 5}}
        for name in objectives
    ]
    spec: dict[str, Any] = {
        "task": "train",
        "recipe": "1",
        "dataset": str(data),
        "dataset_fingerprint": "f",
        "base_model": str(base),
        "base_model_identity": base_model.identity(str(base)),
        "stages": stages,
        "adapter": adapter,
        "seed": 7,
        "threads": 1,
        "precision": "float32",
        "output": str(output),
        **changes,
    }
    return {**spec, "spec_hash": spec_hash(spec)}


def curve(output: Path) -> list[dict[str, Any]]:
    """The points of a job's curve, without what time changes and without recoveries."""
    points = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    noise = ("seconds", "tokens_per_second", "memory_gib")
    return [{key: value for key, value in point.items() if key not in noise} for point in points if "recovery" not in point]


def losses(output: Path) -> list[float]:
    """Of the training, from a job's curve."""
    return [point["loss"] for point in curve(output) if "loss" in point]


def events(output: Path, what: str) -> list[dict[str, Any]]:
    """A finished job's recoveries of one kind."""
    return [event for event in json.loads((output / "result.json").read_text())["recoveries"] if event["what"] == what]
