"""Writes weeks of conversations and feedback from a source: validated, scrubbed, and whole or not at all.

A week folder holds `part.parquet` and, written last, `counts.json`: week, read, kept, dropped, repaired (table -> rows),
rejected_by_reason (table -> reason -> rows), personal_data (kind -> values), unknown_columns (table -> names), source_digest,
part_digest, code_version. `read = kept + dropped` holds for each table.
A kept message counts in the week of its conversation, every other row in its own. Rows without a usable time are in
`rejected/week=unknown`, with their numbers beside them (`conversations_counts.json`); each run writes them in full.
Rebuilding a week replaces its files one by one: a run that dies in between leaves whole files, and a week that `stale_weeks`
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from finetune_assets.corpus.schema import CODE_VERSIONS, CONVERSATIONS, FEEDBACK, KINDS, MESSAGE, REJECTED, UNKNOWN_WEEK
from finetune_assets.corpus.scrubbing import Scrubbed, buckets, clean_ids, clean_labels, pseudonyms, scrub_texts
from finetune_assets.corpus.sources import SourceTables
from finetune_assets.corpus.staleness import ASSETS, Staleness, empty_digest, part_digest, source_digests, stale_weeks
from finetune_assets.corpus.validation import Validated, validate
from finetune_assets.storage import Store, write_json, write_parquet

__all__ = ["Staleness", "ingest_conversations", "ingest_feedback", "stale_weeks"]

Counts = dict[str, dict[str, Any]]


def ingest_conversations(store: Store, source_tables: SourceTables, weeks: Sequence[str], key: bytes) -> Counts:
    """Writes `corpus/conversations` of some weeks (Mondays, YYYY-MM-DD) and the tenants; gives the numbers of each week."""
    valid = validate(source_tables)
    wanted = pl.col("week").is_in(list(weeks))
    conversations, messages = valid.conversations.filter(wanted), valid.messages.filter(wanted)
    scrubbed = scrub_texts(messages, _of(valid.feedback, conversations["conversation_id"]))
    parts = _split(_stored_conversations(conversations, scrubbed.messages, key), weeks, CONVERSATIONS)
    counts = _write(store, "conversations", source_tables, parts, (scrubbed, key))
    write_json(store.tenants, _tenants(valid.conversations, key))
    return counts


def ingest_feedback(store: Store, source_tables: SourceTables, weeks: Sequence[str], key: bytes) -> Counts:
    """Writes `corpus/feedback` of some weeks; gives the numbers of each. Texts are scrubbed with their conversation's."""
    valid = validate(source_tables)
    wanted = pl.col("week").is_in(list(weeks))
    concerned = valid.feedback.filter(wanted)["conversation_id"].unique()
    scrubbed = scrub_texts(_of(valid.messages, concerned), _of(valid.feedback, concerned))
    parts = _split(_stored_feedback(scrubbed.feedback.filter(wanted), key), weeks, FEEDBACK)
    return _write(store, "feedback", source_tables, parts, (scrubbed, key))


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


def _write(
    store: Store, table: str, tables: SourceTables, parts: dict[str, pl.DataFrame], scrubbed_key: tuple[Scrubbed, bytes]
) -> Counts:
    valid, (scrubbed, key) = validate(tables), scrubbed_key
    members = ("conversations", "messages") if table == "conversations" else ("feedback",)
    rejected = valid.rejected.filter(pl.col("table").is_in(members))
    rejected = rejected.with_columns(
        *(clean_ids(rejected[name], rejected["user_id"], key).alias(name) for name in ("id", "conversation_id")),
        pseudonyms(rejected["user_id"], key).alias("user"),
    )
    set_aside = _split(rejected.sort(rejected.columns, nulls_last=True), [*parts, UNKNOWN_WEEK], REJECTED)
    tally = _Tally(valid, members)
    digests = source_digests(tables)[table]
    counts: Counts = {}
    for week, frame in set_aside.items():
        write_parquet(store.corpus("rejected", week) / f"{table}.parquet", frame)
        numbers = {"week": week, **tally.of(week), "code_version": CODE_VERSIONS[ASSETS[table]]}
        if week == UNKNOWN_WEEK:
            write_json(store.corpus("rejected", week) / f"{table}_counts.json", numbers)
            continue
        folder = store.corpus(table, week)
        write_parquet(folder / "part.parquet", parts[week])
        found = (
            scrubbed.found.filter((pl.col("week") == week) & pl.col("table").is_in(members))
            .group_by("kind")
            .agg(pl.col("rows").sum())
        )
        counts[week] = {
            **numbers,
            "personal_data": dict(sorted(found.iter_rows())),
            "unknown_columns": {name: tables.unknown_columns[name] for name in members},
            "source_digest": digests.get(week) or empty_digest(table),
            "part_digest": part_digest(folder / "part.parquet"),
        }
        write_json(folder / "counts.json", counts[week])
    return counts


class _Tally:
    """Counts rows by week: what was read (every source row), kept, dropped, repaired, and why."""

    def __init__(self, valid: Validated, members: Sequence[str]) -> None:
        self.members = members
        frames = {"conversations": valid.conversations, "messages": valid.messages, "feedback": valid.feedback}
        kept = pl.concat(frames[name].select(pl.lit(name).alias("table"), "week") for name in members)
        self.kept = _numbers(kept.group_by("table", "week").len())
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


def _tenants(conversations: pl.DataFrame, key: bytes) -> dict[str, str]:
    """The vertical of each tenant, from its newest conversation; conversations come in order of time."""
    newest = conversations.group_by("tenant_id", maintain_order=True).agg(pl.col("vertical").last())
    tenants, verticals = (clean_labels(newest[name], key).to_list() for name in ("tenant_id", "vertical"))
    return dict(sorted(zip(tenants, verticals, strict=True)))
