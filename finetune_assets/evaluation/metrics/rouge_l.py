"""ROUGE-L F1 (Lin 2004) over rouge-score, with words of any alphabet.

rouge-score's own tokenizer keeps `a-z0-9` only: it cuts `mañana` into `ma` and `ana`.

    evaluate.load("finetune_assets/evaluation/metrics/rouge_l.py").compute(predictions=["hola"], references=["hola"])
"""

# pyright: basic

from __future__ import annotations

import re
from typing import Any

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

COLUMNS = ["f1"]


class WordTokenizer(Tokenizer):
    """Lower-case runs of letters and digits of any alphabet."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return re.findall(r"\w+", text.lower())


class RougeL(evaluate.Metric):
    """Mean ROUGE-L F1, 0..1, and the F1 of each row; null without a word of a reference."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean ROUGE-L F1 over rouge-score, 0..1, with the F1 of each row.",
            citation="Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries. ACL workshop.",
            inputs_description="predictions: replies; references: one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        words = WordTokenizer()
        scorer = RougeScorer(["rougeL"], tokenizer=words)
        rows = [
            float(scorer.score(r, p)["rougeL"].fmeasure) if words.tokenize(r) else None
            for p, r in zip(predictions, references, strict=True)
        ]
        known = [row for row in rows if row is not None]
        mean = sum(known) / len(known) if known else None
        return {"rouge_l": mean, "columns": COLUMNS, "statistics": [[row] for row in rows]}
