"""Writes weeks of conversations and feedback from a source: validated, scrubbed, and whole or not at all.

A week folder holds `part.parquet` and, written last, `counts.json`: week, read, kept, dropped, repaired (table -> rows),
rejected_by_reason (table -> reason -> rows), personal_data (kind -> values), unknown_columns (table -> names), source_digest,
part_digest, part_bytes, code_version, contacts (digest of the tenants' own contacts and phone regions); of conversations also
tenants (tenant -> vertical). `read = kept + dropped` holds for each table.
A kept message counts in the week of its conversation, every other row in its own. Rows without a usable time are in
`rejected/week=unknown`, with their numbers beside them (`conversations_counts.json`); see `undated`.
Rebuilding a week replaces its files one by one: a run that dies in between leaves whole files, and a week that `stale_weeks`
names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from finetune_assets.corpus.index import Snapshot, look, unmark
from finetune_assets.corpus.schema import CODE_VERSIONS, CONVERSATIONS, FEEDBACK, KINDS, MESSAGE, REJECTED, UNKNOWN_WEEK
from finetune_assets.corpus.scrubbing import (
    TEXTS,
    allowed_in,
    buckets,
    clean_ids,
    clean_labels,
    own_digest,
    pseudonyms,
    regions_in,
    scrub_texts,
)
from finetune_assets.corpus.sources import SourceTables
from finetune_assets.corpus.staleness import ASSETS, GROUP_SHARE, Staleness, counts_of, part_digest, stale_weeks, week_digests
from finetune_assets.corpus.undated import MEMBERS, write_undated
from finetune_assets.corpus.validation import Validated, validate
from finetune_assets.corpus.vanished import vanished
from finetune_assets.environment import Environment
from finetune_assets.storage import Store, write_json, write_parquet

__all__ = ["Staleness", "ingest_conversations", "ingest_feedback", "ingest_undated", "stale_weeks", "write_tenants"]

Counts = dict[str, dict[str, Any]]


def ingest_conversations(store: Store, source: SourceTables, weeks: Sequence[str], key: bytes) -> Counts:
    """Writes `corpus/conversations` of some weeks (Mondays, YYYY-MM-DD) and the tenants; gives the numbers of each week.

    Rows are read, judged and written in groups of weeks that fit the memory setting. `vanished` in the numbers, where it is
    there: stored conversations that the source no longer holds.
    """
    counts: Counts = {}
    for group, valid, snapshot in _groups(store, source, "conversations", weeks):
        wanted = pl.col("week").is_in(group)
        conversations, messages = valid.conversations.filter(wanted), valid.messages.filter(wanted)
        judged_texts = _of(valid.feedback, conversations["conversation_id"])
        scrubbed = scrub_texts(
            messages, judged_texts, allowed_in(conversations, source.contacts), regions_in(conversations, source.regions)
        )
        parts = _split(_stored_conversations(conversations, scrubbed.messages, key), group, CONVERSATIONS)
        gone = vanished(store, source, snapshot.held, group, snapshot.seed)
        counts |= _write(store, "conversations", _Judged(valid, snapshot, group, parts, scrubbed.found, source), key)
        for week, number in gone.items():
            counts[week] = {**counts[week], "vanished": number}
    if weeks:
        ingest_undated(store, source, "conversations", key)
    write_tenants(store, source)
    return counts


def write_tenants(store: Store, source: SourceTables) -> None:
    """Writes the tenants of all stored weeks, and what stays in their texts."""
    write_json(store.tenants, _tenants(store))
    write_json(store.contacts, {tenant: sorted(own) for tenant, own in source.contacts.items()})
    write_json(store.regions, dict(source.regions))


def ingest_feedback(store: Store, source: SourceTables, weeks: Sequence[str], key: bytes) -> Counts:
    """Writes `corpus/feedback` of some weeks; gives the numbers of each. Texts are scrubbed with their conversation's."""
    counts: Counts = {}
    for group, valid, snapshot in _groups(store, source, "feedback", weeks):
        wanted = pl.col("week").is_in(group)
        has_text = pl.any_horizontal(pl.col(name).is_not_null() for name in TEXTS["feedback"])
        concerned = valid.feedback.filter(wanted & has_text)["conversation_id"].unique()
        said, own = _of(valid.messages, concerned), _of(valid.conversations, concerned)
        judged = valid.feedback.filter(wanted | pl.col("conversation_id").is_in(concerned.implode()))
        scrubbed = scrub_texts(said, judged, allowed_in(own, source.contacts), regions_in(own, source.regions))
        parts = _split(_stored_feedback(scrubbed.feedback.filter(wanted), key), group, FEEDBACK)
        counts |= _write(store, "feedback", _Judged(valid, snapshot, group, parts, scrubbed.found, source), key)
    if weeks:
        ingest_undated(store, source, "feedback", key)
    return counts


@dataclass(frozen=True)
class _Judged:
    """A group of weeks that is ready to be written."""

    valid: Validated
    snapshot: Snapshot
    weeks: list[str]
    parts: dict[str, pl.DataFrame]
    found: pl.DataFrame
    source: SourceTables


def _groups(
    store: Store, source: SourceTables, table: str, weeks: Sequence[str]
) -> Iterator[tuple[list[str], Validated, Snapshot]]:
    memory = Environment.read().memory
    snapshot = look(store, source, memory)
    for group in snapshot.groups(table, weeks, int(memory * GROUP_SHARE)):
        yield group, validate(snapshot.load(snapshot.closure(table, group))), snapshot


def _of(frame: pl.DataFrame, conversation_ids: pl.Series) -> pl.DataFrame:
    return frame.filter(pl.col("conversation_id").is_in(conversation_ids.unique().implode()))


def _stored_conversations(conversations: pl.DataFrame, messages: pl.DataFrame, key: bytes) -> pl.DataFrame:
    """Validated conversations and their scrubbed messages as CONVERSATIONS, with `week`; in order of time."""
    cleaned = messages.with_columns(clean_ids(messages["message_id"], messages["user_id"], key).alias("message_id"))
    nested = cleaned.group_by("conversation_id", maintain_order=True).agg(
        pl.struct(field.name for field in MESSAGE.fields).alias("messages")
    )
    users, ids = conversations["user_id"], conversations["conversation_id"]
    frame = conversations.join(nested, on="conversation_id", how="inner", maintain_order="left")
    return frame.with_columns(
        clean_ids(ids, users, key).alias("conversation_id"),
        *(clean_labels(conversations[name], key).alias(name) for name in ("tenant_id", "vertical")),
        clean_labels(conversations["channel"].fill_null("unknown"), key).alias("channel"),
        pseudonyms(users, key).alias("user"),
        buckets(users, ids).alias("bucket"),
        pl.col("training_consent").fill_null(True),
        pl.col("kind").fill_null(KINDS[0]),
    )


def _stored_feedback(feedback: pl.DataFrame, key: bytes) -> pl.DataFrame:
    """Scrubbed feedback as FEEDBACK, with `week`; in order of time."""
    users = feedback["user_id"]
    return feedback.with_columns(
        *(clean_ids(feedback[name], users, key).alias(name) for name in ("feedback_id", "conversation_id", "message_id")),
        clean_labels(feedback["tenant_id"], key).alias("tenant_id"),
    )


def _split(frame: pl.DataFrame, weeks: Sequence[str], schema: pl.Schema) -> dict[str, pl.DataFrame]:
    """The frame of each week, in exactly the stored columns and types; empty for a week without rows."""
    by_week = frame.partition_by("week", as_dict=True, maintain_order=True)
    typed = {
        str(week): part.select(pl.col(name).cast(dtype) for name, dtype in schema.items()) for (week,), part in by_week.items()
    }
    return {week: typed.get(week, schema.to_frame()) for week in sorted(set(weeks))}


def _write(store: Store, table: str, judged: _Judged, key: bytes) -> Counts:
    valid, source = judged.valid, judged.source
    members = MEMBERS[table]
    rejected = valid.rejected.filter(pl.col("table").is_in(members) & pl.col("week").is_in(judged.weeks))
    rejected = rejected.with_columns(
        *(clean_ids(rejected[name], rejected["user_id"], key).alias(name) for name in ("id", "conversation_id")),
        pseudonyms(rejected["user_id"], key).alias("user"),
    )
    set_aside = _split(rejected.sort(rejected.columns, nulls_last=True), judged.weeks, REJECTED)
    tally = _Tally(valid, members)
    digests = week_digests(table, valid, judged.weeks)
    tenants = _newest_tenants(valid.conversations, key) if table == "conversations" else {}
    counts: Counts = {}
    for week, frame in set_aside.items():
        write_parquet(store.corpus("rejected", week) / f"{table}.parquet", frame)
        numbers = {"week": week, **tally.of(week), "code_version": CODE_VERSIONS[ASSETS[table]]}
        folder = store.corpus(table, week)
        write_parquet(folder / "part.parquet", judged.parts[week])
        found = judged.found.filter((pl.col("week") == week) & pl.col("table").is_in(members))
        counts[week] = {
            **numbers,
            "personal_data": dict(sorted(found.group_by("kind").agg(pl.col("rows").sum()).iter_rows())),
            "unknown_columns": {name: judged.snapshot.unknown_columns[name] for name in members},
            "source_digest": digests[week],
            "part_digest": part_digest(folder / "part.parquet"),
            "part_bytes": (folder / "part.parquet").stat().st_size,
            "contacts": own_digest(source.contacts, source.regions, tenants.get(week, {}) if table == "conversations" else None),
        }
        if table == "conversations":
            counts[week]["tenants"] = tenants.get(week, {})
        write_json(folder / "counts.json", counts[week])
    unmark(store, table, judged.weeks, judged.snapshot.generation)
    return counts


def ingest_undated(store: Store, source: SourceTables, table: str, key: bytes) -> None:
    """Sets aside the rows without a usable time of `conversations` or `feedback`, and writes their numbers."""
    rejected = write_undated(store, table, look(store, source, Environment.read().memory), key)
    counted = rejected.group_by("table", "reason").len().sort("reason")
    by_reason = {name: dict(counted.filter(pl.col("table") == name).drop("table").iter_rows()) for name in MEMBERS[table]}
    none, dropped = dict.fromkeys(by_reason, 0), {name: sum(reasons.values()) for name, reasons in by_reason.items()}
    numbers = {"read": dropped, "kept": none, "dropped": dropped, "repaired": none, "rejected_by_reason": by_reason}
    numbers |= {"week": UNKNOWN_WEEK, "code_version": CODE_VERSIONS[ASSETS[table]]}
    write_json(store.corpus("rejected", UNKNOWN_WEEK) / f"{table}_counts.json", numbers)


class _Tally:
    """Counts rows by week: what was read (every source row), kept, dropped, repaired, and why."""

    def __init__(self, valid: Validated, members: Sequence[str]) -> None:
        self.members = members
        frames = {"conversations": valid.conversations, "messages": valid.messages, "feedback": valid.feedback}
        kept = (frames[name].group_by("week").len().select(pl.lit(name).alias("table"), "week", "len") for name in members)
        self.kept = _numbers(pl.concat(kept))
        self.read = _numbers(valid.read.select("table", "week", "rows"))
        by_action = valid.rejected.group_by("table", "week", "action").len()
        self.dropped = _numbers(by_action.filter(pl.col("action") == "dropped").drop("action"))
        self.repaired = _numbers(by_action.filter(pl.col("action") == "repaired").drop("action"))
        reasons = valid.rejected.group_by("table", "week", "reason").len().sort("reason")
        self.reasons: dict[tuple[str, str], dict[str, int]] = {}
        for table, week, reason, rows in reasons.iter_rows():
            self.reasons.setdefault((table, week), {})[reason] = rows

    def of(self, week: str) -> dict[str, Any]:
        """The numbers of one week, for each table."""
        names = ("read", "kept", "dropped", "repaired")
        numbers = {name: {table: getattr(self, name).get((table, week), 0) for table in self.members} for name in names}
        return {**numbers, "rejected_by_reason": {table: self.reasons.get((table, week), {}) for table in self.members}}


def _numbers(frame: pl.DataFrame) -> dict[tuple[str, str], int]:
    return {(table, week): rows for table, week, rows in frame.iter_rows()}


def _newest_tenants(conversations: pl.DataFrame, key: bytes) -> dict[str, dict[str, str]]:
    """For each week the vertical of each tenant, from its newest conversation; conversations come in order of time."""
    newest = conversations.group_by("week", "tenant_id", maintain_order=True).agg(pl.col("vertical").last())
    names = (clean_labels(newest[name], key) for name in ("tenant_id", "vertical"))
    found: dict[str, dict[str, str]] = {}
    for week, tenant, vertical in zip(newest["week"], *names, strict=True):
        found.setdefault(week, {})[tenant] = vertical
    return found


def _tenants(store: Store) -> dict[str, str]:
    """The vertical of each tenant, as the newest stored week has it."""
    tenants: dict[str, str] = {}
    for week in store.weeks("conversations"):
        tenants |= counts_of(store.corpus("conversations", week)).get("tenants", {})
    return dict(sorted(tenants.items()))
