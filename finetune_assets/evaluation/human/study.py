"""A study: what is to be rated, and who rates what.

    pairs     two candidates' replies to the same test prompt, or a shadow's reply beside the live one; different ones, blind,
              sides at random
    review    training examples, to accept or to reject

Each item has one rater, drawn by a hash; OVERLAP of them have two, so that their agreement can be told. `study.json` holds all of
it, and never changes once it is made: a link opened again goes on where its rater stopped.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import polars as pl

from finetune_assets.errors import DataError
from finetune_assets.evaluation.candidates import TestRow, by_hash
from finetune_assets.storage import Store, read_json, write_json

Kind = Literal["pairs", "review"]
OVERLAP = 0.2
"""Share of the items that two raters get."""
CHOICES: Mapping[Kind, tuple[str, ...]] = {"pairs": ("left", "right", "tie", "both_bad"), "review": ("accept", "reject")}
TAGS: Mapping[Kind, tuple[str, ...]] = {
    "pairs": ("wrong_fact", "not_helpful", "tone", "language", "too_long"),
    "review": ("wrong_fact", "personal_data", "tone", "language", "incomplete"),
}


@dataclass(frozen=True)
class Item:
    """One thing to rate."""

    item: str
    conversation_id: str
    message_id: str
    tenant_id: str
    context: list[dict[str, Any]]
    """The turns before the reply, without the system message."""
    system: str
    replies: dict[str, str]
    """Candidate -> reply; one entry, `example`, in a review."""


@dataclass(frozen=True)
class Study:
    """What is rated, and by whom."""

    assistant: str
    name: str
    kind: Kind
    language: str
    version: str
    """Model version of the pairs; data set of a review."""
    candidates: list[str]
    """First and second; a win is the first's. `example` alone in a review."""
    raters: dict[str, list[str]]
    """Rater -> items, in the order in which they are shown."""
    items: list[Item]

    def item(self, name: str) -> Item:
        """One item. Raises KeyError."""
        return next(item for item in self.items if item.item == name)

    def sides(self, item: Item, rater: str) -> list[str]:
        """Candidates from left to right: at random, and the same whenever the rater comes back."""
        names = list(self.candidates)
        return names[::-1] if _hash(self.name, item.item, rater)[0] & 1 else names


def pairs(rows: Sequence[TestRow], frames: Mapping[str, pl.DataFrame], candidates: Sequence[str], most: int) -> list[Item]:
    """At most `most` pairs of different replies, one a conversation first, in the order of a hash. Raises DataError for none."""
    first, second = (frames[name]["reply"].to_list() for name in candidates)
    found: list[tuple[int, bytes, Item]] = []
    seen: dict[str, int] = {}
    order = sorted(range(len(rows)), key=lambda n: _hash(rows[n].message_id))
    for n in order:
        if not first[n] or not second[n] or first[n].strip() == second[n].strip():
            continue
        row = rows[n]
        seen[row.conversation_id] = seen.get(row.conversation_id, 0) + 1
        item = _item(row, dict(zip(candidates, (first[n], second[n]), strict=True)))
        found.append((seen[row.conversation_id], _hash(row.message_id), item))
    if not found:
        raise DataError(f"{' and '.join(candidates)} gave the same reply to every test row; there is nothing to compare.")
    return [item for _, _, item in sorted(found, key=lambda one: one[:2])][:most]


def examples(rows: Sequence[TestRow], most: int) -> list[Item]:
    """At most `most` training examples in the order of a hash."""
    return [_item(row, {"example": row.reference}) for row in by_hash(rows)[:most]]


def assign(items: Sequence[Item], raters: Sequence[str], overlap: float = OVERLAP) -> dict[str, list[str]]:
    """Who gets which: the items in turn, the first `overlap` of them to two. Raises DataError without raters."""
    if not raters:
        raise DataError("A study needs at least one rater.")
    given: dict[str, list[str]] = {rater: [] for rater in raters}
    twice = round(len(items) * overlap) if len(raters) > 1 else 0
    for n, item in enumerate(items):
        given[raters[n % len(raters)]].append(item.item)
        if n < twice:
            given[raters[(n + 1) % len(raters)]].append(item.item)
    return {rater: sorted(names, key=lambda name: _hash(rater, name)) for rater, names in given.items()}


def pairs_needed(win_rate: float, power: float = 0.8, level: float = 0.95) -> int:
    """Pairs that tell a win rate from one half (two-sided, normal approximation; Fleiss 1981): 60 % 194, 65 % 85, 70 % 47."""
    normal = NormalDist()
    spread = normal.inv_cdf((1 + level) / 2) * 0.5 + normal.inv_cdf(power) * math.sqrt(win_rate * (1 - win_rate))
    return math.ceil(round((spread / (win_rate - 0.5)) ** 2, 6))


def folder(store: Store, assistant: str) -> Path:
    """Where an assistant's studies are."""
    return store.home / "ratings" / assistant


def write(store: Store, study: Study) -> Path:
    """Writes `study.json`. Raises DataError where a study of that name is there: it may have ratings already."""
    path = folder(store, study.assistant) / study.name / "study.json"
    if path.exists():
        raise DataError(f"Study {study.name} of {study.assistant} is there already ({path}); give the new one another name.")
    write_json(path, asdict(study))
    return path


def load(store: Store, assistant: str, name: str) -> Study:
    """A study. Raises DataError where there is none."""
    path = folder(store, assistant) / name / "study.json"
    if not path.exists():
        known = ", ".join(sorted(p.parent.name for p in folder(store, assistant).glob("*/study.json"))) or "none"
        raise DataError(f"{assistant} has no study {name!r}; there are: {known}. Start one with `finetune rating start`.")
    values: dict[str, Any] = read_json(path)
    items = [Item(**item) for item in values.pop("items")]
    return Study(items=items, **values)


def newest(store: Store, assistant: str, version: str | None = None, candidates: Sequence[str] = ()) -> Study | None:
    """The study of pairs that was started last, of this version and these candidates where they are given; null for none."""
    paths = sorted(folder(store, assistant).glob("*/study.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    studies = (load(store, assistant, path.parent.name) for path in paths)
    return next(
        (
            study
            for study in studies
            if study.kind == "pairs"
            and version in (None, study.version)
            and (not candidates or study.candidates == list(candidates))
        ),
        None,
    )


def _item(row: TestRow, replies: dict[str, str]) -> Item:
    system = next((m["content"] for m in row.messages if m["role"] == "system"), "")
    context = [dict(m) for m in row.messages if m["role"] != "system"]
    return Item(_hash(row.message_id).hex()[:12], row.conversation_id, row.message_id, row.tenant_id, context, system, replies)


def _hash(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
