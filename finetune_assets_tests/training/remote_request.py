"""A small frozen data set and an assistant with a rented trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.storage import Store
from finetune_assets.training.openai_wire import OpenAIWire
from finetune_assets.training.remote import Connection, Notes
from finetune_assets.training.spec import request_for
from finetune_assets.training.trainer import TrainingRequest
from finetune_assets_tests.tiny_model import dialogues


def dataset(folder: Path, rows: int = 30, validation: int = 12) -> Path:
    """train, validation, test and preferences of made-up dialogues."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", rows, 0), ("validation", validation, 9), ("test", 12, 5)):
        lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in dialogues(count, seed=seed, turns=2)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    pairs = [
        {"prompt": chat[:-1], "chosen": [chat[-1]], "rejected": [{"role": "assistant", "content": "No sé."}]}
        for chat in dialogues(rows, seed=3)
    ]
    for name in ("preferences", "preferences_heldout"):
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


END = "2099-01-14"


def own_days(folder: Path) -> Path:
    """A folder for FINETUNE_TABLES in which every rented model trains on and ends on END, whatever the shipped table says."""
    rows = [
        f'- {{provider: {name}, model: "", shutdown: {END}, source: test, noted: 2026-11-01}}\n' for name in ("openai", "azure")
    ]
    folder.mkdir(parents=True)
    (folder / "lifecycle.yaml").write_text("".join(rows))
    return folder


def assistant(trainer: str = "openai", **settings: Any) -> Assistant:
    """An assistant of a rented trainer."""
    model = {} if trainer in ("openai", "azure") else {"base_model": "open/small-7b"}
    remote = {"min_model_life_days": 0, **settings.pop("remote", {})}
    values = {"name": "dental", "select": {"vertical": "dental"}, "trainer": trainer, **model, "remote": remote, **settings}
    return Assistant.model_validate(values)


def request(folder: Path, settings: Assistant, key: str = "job-abc-1") -> TrainingRequest:
    """The request of that assistant on that data set."""
    made, _ = request_for(settings, folder, "f1f1f1", key)
    return made


MADE: list[OpenAIWire] = []
"""Closed after each test: a socket that the garbage collector finds open fails whichever test runs then."""


def wire(settings: Assistant, home: Path, journal: Any = None, settle: float = 0.5) -> OpenAIWire:
    """A trainer with a journal in memory."""
    MADE.append(OpenAIWire(Connection.of(settings), Store(home), journal or Notes(), settle))
    return MADE[-1]
