"""How well personal data are found in one's own texts: made-up people are planted into a copy of them, and looked for.

    measure(talks)      `talks`: conversations as lists of texts, already scrubbed, so what is found beyond is planted or needless

Nothing that is planted belongs to anybody. Values have valid check digits, stand in sentences of `planted_texts`, and go into a
user's text at its beginning or end. Needless is a change to a text into which nothing personal was planted: the other texts of
these conversations, and texts that hold a time, a date, a price, a count or an order number. BLIND is planted as well although no
recogniser looks for it, so that nobody takes the recall for all personal data.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from finetune_assets.corpus.personal_data import DEFAULT_REGIONS, KINDS, may_ask, may_hold, scrub_conversation
from finetune_assets.corpus.planted_texts import BLIND, DECOYS, SENTENCES, VALUES, Make, decoy

MOST_TALKS = 400
MOST_TEXTS = 40  # of a conversation, from its beginning
SHOWN = 200


@dataclass
class Planted:
    """What was planted and found by kind, and clean texts that were changed. `missed`, `needless`: (kind, text)."""

    talks: int
    planted: Counter[str] = field(default_factory=Counter[str])
    found: Counter[str] = field(default_factory=Counter[str])
    clean: int = 0
    needless: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    missed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def recall(self) -> float:
        """Share of the planted values of KINDS that are gone."""
        return sum(self.found[kind] for kind in KINDS) / max(sum(self.planted[kind] for kind in KINDS), 1)

    @property
    def needless_share(self) -> float:
        """Share of the clean texts that were changed."""
        return len(self.needless) / max(self.clean, 1)

    def as_dict(self) -> dict[str, Any]:
        """Numbers alone, as JSON."""
        of = {kind: {"planted": self.planted[kind], "found": self.found[kind]} for kind in (*KINDS, *BLIND)}
        return {
            "conversations": self.talks,
            "planted": sum(self.planted[kind] for kind in KINDS),
            "recall": round(self.recall, 4),
            "clean_texts": self.clean,
            "needless": len(self.needless),
            "needless_share": round(self.needless_share, 5),
            "kinds": {kind: of[kind] for kind in KINDS},
            "not_looked_for": {kind: of[kind] for kind in BLIND},
        }


Scrub = Callable[[list[str]], list[str]]


def measure(
    talks: Sequence[Sequence[str]],
    *,
    language: str = "es",
    regions: Sequence[str] = DEFAULT_REGIONS,
    allow: frozenset[str] = frozenset(),
    each: int = 50,
    seed: int = 0,
) -> Planted:
    """Plants `each` values of every kind, one a conversation, and scrubs as the corpus does. Equal arguments, equal figures.

    `regions` are those of national phone numbers, planted and looked for. Without conversations the sentences stand alone.
    """
    draw = random.Random(seed)
    chosen = [list(talk)[:MOST_TEXTS] for talk in talks if talk]
    draw.shuffle(chosen)
    chosen = chosen[:MOST_TALKS]
    made = Planted(len(chosen))
    carriers = chosen or [[""]]
    number = 0
    for kind in (*KINDS, *BLIND):
        for value, text in _sentences(draw, kind, language, tuple(regions), each):
            talk = list(carriers[number % len(carriers)])
            number += 1
            place = draw.randrange(0, len(talk), 2)  # the user speaks first
            before = talk[place]
            talk[place] = _joined(text, before) if draw.random() < 0.5 else _joined(before, text)
            after = _scrubbed(talk, regions, allow)
            made.planted[kind] += 1
            if value in after[place]:
                made.missed.append((kind, text))
            else:
                made.found[kind] += 1
            if kind in BLIND:
                continue
            made.clean += len(talk) - 1
            for old, new in zip(talk[:place] + talk[place + 1 :], after[:place] + after[place + 1 :], strict=True):
                if old != new:
                    made.needless.append((f"beside a planted {kind}", old))
    _decoys(made, draw, carriers, lambda talk: _scrubbed(talk, regions, allow), language)
    return made


def _sentences(draw: random.Random, kind: str, language: str, regions: tuple[str, ...], each: int) -> Iterator[tuple[str, str]]:
    """Values (phones of all regions in turn), and the sentences (all patterns in turn) that hold them."""
    make: Make = VALUES[kind]
    patterns = SENTENCES[kind].get(language, SENTENCES[kind]["es"])
    for number in range(each):
        value = make(draw, language, regions[number % len(regions)] if regions else "")
        yield value, patterns[number % len(patterns)].format(value)


def _decoys(made: Planted, draw: random.Random, talks: list[list[str]], scrub: Scrub, language: str) -> None:
    for talk in talks:
        texts = [_joined(text, decoy(draw, language)) for text in talk]
        made.clean += len(texts)
        made.needless += [("in a clean text", old) for old, new in zip(texts, scrub(texts), strict=True) if old != new]


def _joined(one: str, other: str) -> str:
    """Two texts as sentences."""
    one = one.strip()
    return f"{one}{'' if not one or one[-1] in '.,:;?!…' else '.'} {other}".strip()


def _scrubbed(talk: list[str], regions: Sequence[str], allow: frozenset[str]) -> list[str]:
    """As `scrubbing` does: with the cheap look that decides what passes through Python."""
    texts = pl.Series(talk, dtype=pl.String)
    looked = may_hold(texts).to_list(), may_ask(texts).to_list()
    if not any(looked[0]) and not any(looked[1]):
        return talk
    return scrub_conversation(talk, regions=regions, allow=allow, looked=looked)[0]


def lines(made: Planted) -> Iterator[str]:
    """The figures for a reader."""
    facts = made.as_dict()
    yield (
        f"recall {made.recall:.2%} of {facts['planted']} planted values in {made.talks} conversations; "
        f"needless {made.needless_share:.3%} of {made.clean:,} clean texts"
    )
    for group, note in (("kinds", ""), ("not_looked_for", "   no recogniser looks for it")):
        for kind, n in facts[group].items():
            yield f"  {kind.replace('_', ' '):<22} {n['found'] / max(n['planted'], 1):7.2%} of {n['planted']}{note}"


__all__ = ["DECOYS", "Planted", "lines", "measure"]
