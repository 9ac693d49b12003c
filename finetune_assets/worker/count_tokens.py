"""Task `count_tokens`: the plan's count for a model whose tokenizer cannot be read without transformers, or is not here yet.

Spec: {"task": "count_tokens", "output": dir, "base_model", "base_model_identity", "kind", "file", "max_length", "cache"}.
Result: the fields of `plan.TokenCount`, and max_length as used. It downloads the whole model, so that the training needs
no network and the plan knows its size; what it tokenised is in the cache for the training.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune_assets.training import plan
from finetune_assets.training.tokens import token_rows
from finetune_assets.worker import models
from finetune_assets.worker.progress import Progress


def run(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Counts. Raises ModelUnavailable."""
    progress.update("count tokens", 0, 1)
    revision = spec["base_model_identity"].get("revision")
    models.download(spec["base_model"], revision)
    tokenizer = models.load_tokenizer(spec["base_model"], revision)
    config = models.load_config(spec["base_model"], revision)
    max_length = min(int(spec["max_length"]), models.positions(config))
    source = (spec["kind"], Path(spec["file"]))
    with models.rendering(spec["base_model"]):
        rows = token_rows(
            lambda: models.renderer(tokenizer), source, spec["base_model_identity"], max_length, Path(spec["cache"])
        )
    progress.update("count tokens", 1, 1)
    return {**asdict(plan.counted(rows)), "max_length": max_length}
