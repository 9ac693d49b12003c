"""Task `count_tokens`: the plan's count for a model whose tokenizer cannot be read without transformers, or is not here yet.

Spec: {"task": "count_tokens", "output": dir, "base_model", "revision": str or null, "file": JSONL of `messages`, "max_length"}.
Result: the fields of `plan.TokenCount`, and max_length as used. It downloads the whole model, so that the training needs
no network and the plan knows its size.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune_assets.training import plan
from finetune_assets.worker import models
from finetune_assets.worker.progress import Progress


def run(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Counts. Raises ModelUnavailable."""
    progress.update("count tokens", 0, 1)
    models.download(spec["base_model"], spec.get("revision"))
    tokenizer = models.load_tokenizer(spec["base_model"], spec.get("revision"))
    config = models.load_config(spec["base_model"], spec.get("revision"))
    max_length = min(int(spec["max_length"]), models.positions(config))
    count = plan.count_tokens(models.renderer(tokenizer), Path(spec["file"]), max_length)
    progress.update("count tokens", 1, 1)
    return {**asdict(count), "max_length": max_length}
