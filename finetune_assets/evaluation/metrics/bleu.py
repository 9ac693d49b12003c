"""BLEU (Papineni et al. 2002) with sacrebleu's defaults: tokenizer 13a, orders 1 to 4, exponential smoothing, mixed case.

evaluate.load("finetune_assets/evaluation/metrics/bleu.py").compute(predictions=["hola"], references=["hola"])
"""

# pyright: basic

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sacrebleu.metrics.bleu import BLEU

COLUMNS = ["reply_words", "reference_words", *(f"match_{n}" for n in range(1, 5)), *(f"total_{n}" for n in range(1, 5))]


class Bleu(evaluate.Metric):
    """Corpus BLEU, 0..100, and its statistics per row."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Corpus BLEU over sacrebleu, 0..100, with the sufficient statistics of each row.",
            citation="Post, M. (2018). A Call for Clarity in Reporting BLEU Scores. WMT.",
            inputs_description="predictions: replies; references: one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        bleu = BLEU()
        known = [bool(reference.strip()) for reference in references]
        if not any(known):
            return {"bleu": None, "columns": COLUMNS, "statistics": [[0.0] * len(COLUMNS) for _ in references]}
        found = bleu._extract_corpus_statistics(predictions, [references])
        statistics = [row if there else [0] * len(COLUMNS) for row, there in zip(found, known, strict=True)]
        return {"bleu": bleu._aggregate_and_compute(statistics).score, "columns": COLUMNS, "statistics": statistics}
