"""chrF2 (Popović 2015) with sacrebleu's defaults: character orders 1 to 6, beta 2, no white space. It needs no word tokenizer.

evaluate.load("finetune_assets/evaluation/metrics/chrf.py").compute(predictions=["hola"], references=["hola"])
"""

# pyright: basic

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sacrebleu.metrics.chrf import CHRF

COLUMNS = [f"{what}_{n}" for n in range(1, 7) for what in ("reply", "reference", "match")]


class ChrF(evaluate.Metric):
    """Corpus chrF, 0..100, and its statistics per row."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Corpus chrF2 over sacrebleu, 0..100, with the sufficient statistics of each row.",
            citation="Popović, M. (2015). chrF: character n-gram F-score for automatic MT evaluation. WMT.",
            inputs_description="predictions: replies; references: one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        chrf = CHRF()
        known = [bool(reference.strip()) for reference in references]
        if not any(known):
            return {"chrf": None, "columns": COLUMNS, "statistics": [[0.0] * len(COLUMNS) for _ in references]}
        found = chrf._extract_corpus_statistics(predictions, [references])
        statistics = [row if there else [0] * len(COLUMNS) for row, there in zip(found, known, strict=True)]
        return {"chrf": chrf._aggregate_and_compute(statistics).score, "columns": COLUMNS, "statistics": statistics}
