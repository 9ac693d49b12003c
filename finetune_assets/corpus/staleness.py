"""Which stored weeks no longer say what the source says: by a digest of everything that a week is made from.

The digest covers the week's kept and rejected rows after validation (so what another week's rows do to them counts), the texts
that take part in its scrubbing, and the asset's code version. `counts.json` holds it, beside a digest of `part.parquet` itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import polars as pl

from finetune_assets.corpus.personal_data import needs_look
from finetune_assets.corpus.schema import CODE_VERSIONS, UNKNOWN_WEEK
from finetune_assets.corpus.scrubbing import PLACEHOLDER, long_texts
from finetune_assets.corpus.sources import SourceTables
from finetune_assets.corpus.validation import Validated, validate
from finetune_assets.storage import Store, read_json

ASSETS = {"conversations": "raw_conversations", "feedback": "rlhf_feedback", "examples": "clean_examples"}


@dataclass(frozen=True)
class Staleness:
    """Weeks that are missing, damaged, or made from something else than the source and the code are now; each list sorted.

    The corpus mirrors the source: `vanished` weeks are stored but have no source rows any more. They are stale, and become empty.
    """

    conversations: list[str]
    feedback: list[str]
    examples: list[str]
    vanished: list[str]
    all_weeks: list[str]  # every week with source rows
    digests: dict[str, dict[str, str]]  # "conversations" | "feedback" -> week -> digest of the source now

    @property
    def stale(self) -> list[str]:
        """Weeks in which any of the three tables is stale."""
        return sorted({*self.conversations, *self.feedback, *self.examples})


def stale_weeks(store: Store, tables: SourceTables) -> Staleness:
    """Compares the stored weeks with the source; writes nothing."""
    digests = source_digests(tables)
    all_weeks = sorted({week for weeks in digests.values() for week in weeks} - {UNKNOWN_WEEK})
    stale: dict[str, list[str]] = {}
    for table, known in digests.items():
        weeks = sorted({*all_weeks, *store.weeks(table)})
        stale[table] = [
            week for week in weeks if not _is_current(store.corpus(table, week), known.get(week) or empty_digest(table))
        ]
    stored = {week for table in digests for week in store.weeks(table)}
    return Staleness(
        **stale,
        examples=sorted({*stale_examples(store), *(set(all_weeks) - set(store.weeks("examples")))}),
        vanished=sorted(week for week in stored - set(all_weeks) if week in stale["conversations"] or week in stale["feedback"]),
        all_weeks=all_weeks,
        digests=digests,
    )


def stale_examples(store: Store) -> list[str]:
    """Weeks whose examples are missing, damaged, made from other conversations than are stored now, or by older code."""
    stale: list[str] = []
    for week in sorted({*store.weeks("conversations"), *store.weeks("examples")}):
        conversations = counts_of(store.corpus("conversations", week)).get("part_digest")
        if conversations is None or not _is_current(store.corpus("examples", week), examples_digest(conversations)):
            stale.append(week)
    return stale


def examples_digest(conversations_part: str) -> str:
    """What a week of examples is made from: the stored conversations, and the code version."""
    return _digest(["clean_examples", CODE_VERSIONS["clean_examples"], conversations_part])


def part_digest(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def counts_of(folder: Path) -> dict[str, Any]:
    """The numbers of a stored week; empty where the week was not finished."""
    path = folder / "counts.json"
    try:
        return read_json(path) if path.exists() else {}
    except json.JSONDecodeError:
        return {}


def empty_digest(table: str) -> str:
    """Digest of a week without source rows."""
    return _digest(_head(table))


_done: WeakKeyDictionary[SourceTables, dict[str, dict[str, str]]] = WeakKeyDictionary()


def source_digests(tables: SourceTables) -> dict[str, dict[str, str]]:
    """Digest of each week that has source rows (`unknown` included), for conversations and for feedback."""
    if tables not in _done:
        _done[tables] = _source_digests(validate(tables))
    return _done[tables]


def _source_digests(valid: Validated) -> dict[str, dict[str, str]]:
    texts = long_texts(valid.messages, valid.feedback)
    watched = texts.filter(needs_look(texts["text"]) | texts["text"].str.contains(PLACEHOLDER))
    together = watched.group_by("conversation_id", maintain_order=True).agg("table", "column", "text")
    from_feedback = (
        watched.filter(pl.col("table") == "feedback").group_by("conversation_id", maintain_order=True).agg("column", "text")
    )
    with_text = valid.feedback.filter(pl.col("expected_response").is_not_null() | pl.col("comment").is_not_null())
    is_feedback = pl.col("table") == "feedback"
    return {
        "conversations": _by_week(
            "conversations",
            [
                valid.conversations,
                valid.messages,
                valid.rejected.filter(~is_feedback),
                valid.conversations.select("conversation_id", "week").join(from_feedback, on="conversation_id"),
            ],
        ),
        "feedback": _by_week(
            "feedback",
            [
                valid.feedback,
                valid.rejected.filter(is_feedback),
                with_text.select("conversation_id", "week").unique().join(together, on="conversation_id"),
            ],
        ),
    }


def _by_week(table: str, frames: Sequence[pl.DataFrame]) -> dict[str, str]:
    rows = pl.concat(frame.select("week", pl.struct(pl.exclude("week")).struct.json_encode().alias("row")) for frame in frames)
    grouped = rows.sort("week", "row").partition_by("week", as_dict=True)
    return {str(week): _digest([*_head(table), *group["row"]]) for (week,), group in grouped.items()}


def _head(table: str) -> list[str]:
    return [table, CODE_VERSIONS[ASSETS[table]]]


def _digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _is_current(folder: Path, digest: str) -> bool:
    counts, part = counts_of(folder), folder / "part.parquet"
    return counts.get("source_digest") == digest and part.exists() and counts.get("part_digest") == part_digest(part)
