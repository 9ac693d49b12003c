"""How far an assistant's users have drifted from its training set: a distance with a bound for each measure.

unknown_words      share of the users' words that the training set does not hold, beyond the share that its validation set has
lengths            Kolmogorov-Smirnov distance of the characters of messages
intents            total variation distance of what is asked for. Messages of a router have no intent, so a naive Bayes classifier
                   (McCallum & Nigam, 1998, multinomial, add-one) of the words of the training set's labelled messages gives them
                   one, and gives one to the held-out messages too: its mistakes are on both sides. What two samples of this size
                   differ by chance is taken off. Held-out rows are the reference since balancing changes the training rows alone.
negative_feedback  share of the week against the four weeks before

With fewer than LEAST messages of users, or HELD_OUT labelled ones, a measure says nothing.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

LEAST = 100
"""Messages of users, or judgements, below which drift is not measured."""
HELD_OUT = 30
"""Labelled rows of validation and test, below which intents are not compared."""
LIMITS = {"unknown_words": 0.05, "lengths": 0.25, "intents": 0.2, "negative_feedback": 0.1}
"""Distance from which users have drifted: shares of words, people and feedback, distance of distributions."""
UNKNOWN = "unknown"
TOLD = 3
"""Intents that are named, those that changed most."""
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class Drift:
    """One measure: the live week's value, the training set's, their distance; null where there is too little to say."""

    measure: str
    live: float | None = None
    training: float | None = None
    distance: float | None = None
    detail: str = ""

    @property
    def drifted(self) -> bool:
        """Beyond the bound."""
        return self.distance is not None and self.distance > LIMITS[self.measure]

    @property
    def text(self) -> str:
        """For people."""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.measure.replace('_', ' ')} {self.distance or 0.0:.3f} (limit {LIMITS[self.measure]:g}){detail}"

    def row(self) -> dict[str, Any]:
        """For a table."""
        return {**vars(self), "limit": LIMITS[self.measure], "drifted": str(self.drifted).lower()}


def of_texts(texts: Sequence[str], dataset: Path) -> tuple[Drift, ...]:
    """Words, lengths and intents of the users' messages against a frozen data set (a folder)."""
    train = asked(dataset / "train.jsonl")
    if len(texts) < LEAST or not train:
        return Drift("unknown_words"), Drift("lengths"), Drift("intents")
    held = asked(dataset / "validation.jsonl")
    vocabulary = {word for text in train for word in words(text)}
    usual, live = unknown(held, vocabulary), unknown(texts, vocabulary)
    lengths = [len(text) for text in texts], [len(text) for text in train]
    return (
        Drift("unknown_words", live, usual, live - usual),
        Drift("lengths", sum(lengths[0]) / len(texts), sum(lengths[1]) / len(train), distance(*lengths)),
        of_intents(texts, dataset),
    )


def of_feedback(seen: Mapping[str, Any], before: Mapping[str, Any]) -> Drift:
    """Negative feedback of `observed.totals` of a week against those of the weeks before."""
    live, usual = seen["negative"], before["negative"]
    enough = min(seen["feedback"], before["feedback"]) >= LEAST
    return Drift("negative_feedback", live, usual, live - usual if enough else None)


def of_intents(texts: Sequence[str], dataset: Path) -> Drift:
    """Intents of messages against those of the held-out rows; its detail names what changed most."""
    labelled = _labelled(dataset)
    held = [text for split in ("validation", "test") for text, _ in labelled.get(split, ())]
    train = labelled.get("train", [])
    if len(texts) < LEAST or len(held) < HELD_OUT or len({intent for _, intent in train}) < 2:
        return Drift("intents")
    classifier = Classifier(train)
    now, then = (Counter(classifier.intent(text) for text in some) for some in (texts, held))
    sizes = len(texts), len(held)
    change = {intent: now[intent] / sizes[0] - then[intent] / sizes[1] for intent in {*now, *then}}
    apart = sum(abs(value) for value in change.values()) / 2 - by_chance(now, then)
    most = sorted(change, key=lambda intent: -abs(change[intent]))[:TOLD]
    detail = ", ".join(f"{intent} {then[intent] / sizes[1]:.0%} → {now[intent] / sizes[0]:.0%}" for intent in most)
    (intent, _), *_ = now.most_common(1)
    return Drift("intents", now[intent] / sizes[0], then[intent] / sizes[1], max(apart, 0.0), detail)


def by_chance(first: Counter[str], second: Counter[str]) -> float:
    """Total variation distance that two samples of one distribution have on average (normal approximation)."""
    both, n, m = first + second, first.total(), second.total()
    shares = [count / (n + m) for count in both.values()]
    return sum(math.sqrt(2 / math.pi * share * (1 - share) * (1 / n + 1 / m)) for share in shares) / 2


class Classifier:
    """Multinomial naive Bayes of the words of a text."""

    def __init__(self, labelled: Sequence[tuple[str, str]]) -> None:
        counts: dict[str, Counter[str]] = {}
        for text, intent in labelled:
            counts.setdefault(intent, Counter()).update(words(text))
        size = len({word for counter in counts.values() for word in counter})
        rows = Counter(intent for _, intent in labelled)
        self.prior = {intent: math.log(count / len(labelled)) for intent, count in rows.items()}
        self.rare = {intent: -math.log(counter.total() + size + 1) for intent, counter in counts.items()}
        self.known = {
            intent: {word: math.log(count + 1) + self.rare[intent] for word, count in counter.items()}
            for intent, counter in counts.items()
        }

    def intent(self, text: str) -> str:
        """The likeliest; of equals the first by name."""
        said = words(text)

        def score(intent: str) -> float:
            known, rare = self.known[intent], self.rare[intent]
            return self.prior[intent] + sum(known.get(word, rare) for word in said)

        return max(sorted(self.prior), key=score)


def _labelled(dataset: Path) -> dict[str, list[tuple[str, str]]]:
    """(message, intent) of each split's rows whose intent is known."""
    file = dataset / "lineage.parquet"
    if not file.exists():
        return {}
    known = pl.read_parquet(file, columns=["split", "line", "intent"]).filter(pl.col("intent") != UNKNOWN)
    found: dict[str, list[tuple[str, str]]] = {}
    for (split,), rows in known.sort("line").group_by("split"):
        texts = asked(dataset / f"{split}.jsonl")
        found[str(split)] = [(texts[line], intent) for line, intent in rows.select("line", "intent").iter_rows()]
    return found


def asked(file: Path) -> list[str]:
    """The last message of the user in each row; none where there is no such file."""
    if not file.exists():
        return []
    said = (json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines())
    return [[turn["content"] for turn in turns if turn["role"] == "user"][-1] for turns in said]


def words(text: str) -> list[str]:
    """Words of three letters and more, in small letters."""
    return _WORD.findall(text.lower())


def unknown(texts: Iterable[str], vocabulary: set[str]) -> float:
    """Share of the words that are not in the vocabulary; 0 where there is no word."""
    counted = [word in vocabulary for text in texts for word in words(text)]
    return 1 - sum(counted) / len(counted) if counted else 0.0


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Kolmogorov-Smirnov: the largest difference of the two distributions, 0..1."""
    a, b = sorted(first), sorted(second)
    return max(abs(bisect.bisect_right(a, x) / len(a) - bisect.bisect_right(b, x) / len(b)) for x in {*a, *b})
