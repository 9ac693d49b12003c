"""Whether a reply insults, and whether it refuses: word lists of each language, the assistant's own, and a classifier's score.

Lists find what they hold and nothing else. A classifier (`benchmark.conduct.classifier`, any sequence classifier of transformers)
finds more, and errs more on the speech of minorities: Dixon et al. 2018, Measuring and mitigating unintended bias in text
classification; Sap et al. 2019, The risk of racial bias in hate speech detection.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from finetune_assets.assistants.settings.evaluation import Conduct

LISTS = Path(__file__).parent / "general" / "conduct.yaml"
LONGEST = 20_000  # characters of a reply that are searched


@dataclass(frozen=True)
class Watch:
    """What is looked for in replies."""

    insults: re.Pattern[str]
    refusals: re.Pattern[str]
    threshold: float
    """Score of the classifier from which on a reply is toxic."""

    @classmethod
    def of(cls, settings: Conduct, language: str) -> Watch:
        """The lists of the language and of English, with the assistant's own."""
        insults, refusals = (_listed(kind, language) for kind in ("toxic", "refused"))
        return cls(_any([*insults, *settings.toxic]), _any([*refusals, *settings.refusals]), settings.threshold)

    def toxic(self, reply: str, score: float | None = None) -> bool:
        """Whether a reply insults. `score`: the classifier's, null without one."""
        return bool(self.insults.search(reply[:LONGEST])) or (score is not None and score >= self.threshold)

    def refused(self, reply: str) -> bool:
        """Whether a reply says that it will not answer."""
        return bool(self.refusals.search(reply[:LONGEST]))


@lru_cache(maxsize=16)
def _listed(kind: str, language: str) -> tuple[str, ...]:
    known: dict[str, dict[str, list[str]]] = yaml.safe_load(LISTS.read_text(encoding="utf-8"))
    return tuple(pattern for name in dict.fromkeys((language, "en")) for pattern in known[kind].get(name, []))


def _any(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(rf"(?<!\w)(?:{pattern})(?!\w)" for pattern in patterns), re.IGNORECASE)
