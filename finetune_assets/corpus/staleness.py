"""Which stored weeks no longer say what the source says: by a digest of everything that a week is made from.

The index of the source (`index`) names the weeks that changed rows may concern; only theirs is computed. The digest covers the
week's kept and rejected rows after validation (so what another week's rows do to them counts), the texts that take part in its
scrubbing, and the asset's code version. `counts.json` holds it, beside a digest of `part.parquet` itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from finetune_assets.corpus.index import look, marks, stored_weeks, unmark
from finetune_assets.corpus.personal_data import needs_look
from finetune_assets.corpus.schema import CODE_VERSIONS
from finetune_assets.corpus.scrubbing import PLACEHOLDER, long_texts, own_digest
from finetune_assets.corpus.sources import SourceTables
from finetune_assets.corpus.validation import Validated, validate
from finetune_assets.corpus.vanished import vanished
from finetune_assets.environment import Environment
from finetune_assets.storage import Store, read_json

ASSETS = {"conversations": "raw_conversations", "feedback": "rlhf_feedback", "examples": "clean_examples"}


ERASED = "erased"
"""Stands for the digest of the source in a week from which rows were taken: the week is stale, and is made again."""
GROUP_SHARE = 0.025  # of the memory setting, for the raw rows that are judged, scrubbed and written at once


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
    gone: dict[str, int]  # of stale weeks, stored conversations that the source no longer holds
    state: str  # equal for an equal source

    @property
    def stale(self) -> list[str]:
        """Weeks in which any of the three tables is stale."""
        return sorted({*self.conversations, *self.feedback, *self.examples})


def stale_weeks(store: Store, source: SourceTables, full: bool = False) -> Staleness:
    """Compares the stored weeks with the source; writes nothing but the index of the source.

    Only what may have changed is read: files of another size or time, Postgres weeks in the look-back window or of another
    number of rows. `full` reads and compares everything.
    """
    memory = Environment.read().memory
    snapshot = look(store, source, memory, full)
    all_weeks = snapshot.weeks()
    touched = marks(store.home / "corpus" / "index")
    stale: dict[str, list[str]] = {}
    for table in ("conversations", "feedback"):
        weeks = sorted({*all_weeks, *store.weeks(table)})
        counts = {week: counts_of(store.corpus(table, week)) for week in weeks}
        whole = [week for week in weeks if is_current(store.corpus(table, week), CODE_VERSIONS[ASSETS[table]], counts[week])]
        whole = [week for week in whole if _has_contacts(counts[week], source)]
        doubtful = [week for week in whole if full or week in touched.get(table, {})]
        digests: dict[str, str] = {}
        for group in snapshot.groups(table, doubtful, int(memory * GROUP_SHARE)):
            digests |= week_digests(table, validate(snapshot.load(snapshot.closure(table, group))), group)
        same = {week for week in doubtful if counts[week].get("source_digest") == digests[week]}
        unmark(store, table, same, snapshot.generation)
        fresh = (set(whole) - set(doubtful)) | same
        stale[table] = [week for week in weeks if week not in fresh]
    stored = stored_weeks(store)
    return Staleness(
        **stale,
        examples=sorted({*stale_examples(store), *(set(all_weeks) - set(store.weeks("examples")))}),
        vanished=sorted(week for week in stored - set(all_weeks) if week in stale["conversations"] or week in stale["feedback"]),
        all_weeks=all_weeks,
        gone=vanished(store, source, snapshot.held, stale["conversations"], snapshot.seed),
        state=snapshot.state,
    )


def _has_contacts(counts: dict[str, Any], source: SourceTables) -> bool:
    """Whether a week was scrubbed with the contacts and phone regions that its tenants have now."""
    return counts.get("contacts", "") == own_digest(source.contacts, source.regions, counts.get("tenants"))


def stale_examples(store: Store) -> list[str]:
    """Weeks whose examples are missing, damaged, made from other conversations than are stored now, or by older code."""
    stale: list[str] = []
    for week in sorted({*store.weeks("conversations"), *store.weeks("examples")}):
        conversations = counts_of(store.corpus("conversations", week)).get("part_digest")
        folder = store.corpus("examples", week)
        counts = counts_of(folder)
        same = conversations is not None and counts.get("source_digest") == examples_digest(conversations)
        if not same or not is_current(folder, CODE_VERSIONS["clean_examples"], counts):
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


def is_current(folder: Path, code_version: str, counts: dict[str, Any]) -> bool:
    """Whether a week with these numbers is whole and of this code. Its bytes are read only where its size or its time says that
    it was changed."""
    part = folder / "part.parquet"
    if counts.get("code_version") != code_version or counts.get("source_digest") == ERASED or not part.exists():
        return False
    written, listed = part.stat(), (folder / "counts.json").stat()
    if counts.get("part_bytes") == written.st_size and written.st_mtime_ns <= listed.st_mtime_ns:
        return True
    return counts.get("part_digest") == part_digest(part)


def week_digests(table: str, valid: Validated, weeks: Sequence[str]) -> dict[str, str]:
    """Digest of everything that each week of `conversations` or `feedback` is made from; also of weeks without rows.

    `valid` holds at least the closure of the weeks (`Snapshot.closure`).
    """
    wanted = pl.col("week").is_in(list(weeks))
    aside = pl.col("table") == "feedback"
    if table == "conversations":
        rejected = valid.rejected.filter(wanted & ~aside)
        said = _watched(long_texts(valid.messages.clear(), valid.feedback))
        own = valid.conversations.filter(wanted).select("conversation_id", "week")
        frames = [valid.conversations.filter(wanted), valid.messages.filter(wanted), rejected, _in_weeks(said, own)]
    else:
        judged = valid.feedback.filter(wanted)
        with_text = judged.filter(pl.col("expected_response").is_not_null() | pl.col("comment").is_not_null())
        own = with_text.select("conversation_id", "week").unique()
        concerned = pl.col("conversation_id").is_in(own["conversation_id"].unique().implode())
        said = _watched(long_texts(valid.messages.filter(concerned), valid.feedback.filter(concerned)))
        frames = [judged, valid.rejected.filter(wanted & aside), _in_weeks(said, own)]
    hashes = {week: hashlib.blake2b("\n".join((table, CODE_VERSIONS[ASSETS[table]])).encode(), digest_size=16) for week in weeks}
    for number, frame in enumerate(frames):
        for (week,), part in frame.partition_by("week", as_dict=True, maintain_order=True).items():
            hashes[str(week)].update(f"\n{number} {part.height}\n".encode())
            for column in part.drop("week"):
                for content in _contents(column):
                    hashes[str(week)].update(content)
    return {week: own_hash.hexdigest() for week, own_hash in hashes.items()}


def _watched(texts: pl.DataFrame) -> pl.DataFrame:
    """Texts that take part in scrubbing: a value or a placeholder in one decides how the others are written."""
    return texts.filter(needs_look(texts["text"]) | texts["text"].str.contains(PLACEHOLDER)).drop("week", "row")


def _in_weeks(texts: pl.DataFrame, own: pl.DataFrame) -> pl.DataFrame:
    return texts.join(own, on="conversation_id", maintain_order="left").sort("week", "conversation_id", maintain_order=True)


def _contents(column: pl.Series) -> Iterator[bytes | memoryview]:
    """Bytes that tell any two columns of one type and name apart, the same in every version of the libraries."""
    yield column.name.encode() + b":"
    if column.dtype == pl.String:
        yield column.str.len_bytes().cast(pl.Int64).fill_null(-1).to_numpy().data
        yield _texts(column)
    else:
        yield column.to_physical().cast(pl.Int64).fill_null(-(2**62)).to_numpy().data


def _texts(column: pl.Series) -> bytes | memoryview:
    """UTF-8 of all texts, one after the other: Arrow holds them so."""
    texts = column.drop_nulls().rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    _, offsets, content = texts.buffers()
    if offsets is None or content is None:
        return b""
    places = np.frombuffer(offsets, dtype=np.int64)
    first, last = places[texts.offset], places[texts.offset + len(texts)]
    return memoryview(content)[first:last]


def _digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
