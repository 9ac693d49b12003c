"""Text statistics of replies beside their references, by the local `evaluate.Metric` modules."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from finetune_assets.evaluation.metrics import bleu, chrf, rouge_l


def texts(replies: list[str], references: list[str]) -> dict[str, Any]:
    """Sufficient statistics of BLEU and chrF, and ROUGE-L, of each row; zeros and null where its reference is empty."""
    made: dict[str, Any] = {}
    with TemporaryDirectory() as folder:  # evaluate makes a folder, and writes nothing in it
        for name, metric in (("bleu", bleu.Bleu), ("chrf", chrf.ChrF), ("rouge_l", rouge_l.RougeL)):
            scorer: Any = metric(keep_in_memory=True, cache_dir=folder)
            made[name] = scorer.compute(predictions=replies, references=references)["statistics"]
    made["rouge_l"] = [row[0] for row in made["rouge_l"]]
    return made
