"""Which examples an assistant may learn from: its `select`, consent, feedback, satisfaction and content filters.

`reading` gives the examples, `judge` decides what feedback says about each reply, `verdicts` gives every example a source or the
reason why it is dropped. Each example has exactly one of the two, so `read = kept + dropped` holds at every step.

Rules of feedback, per message:
- A correction is an `expected_response` that differs from the reply (blanks aside). It always counts, the newest one wins; the
  corrected text is the target.
- Else the newest of positive and negative decides; of two at the same time the negative one. A "correction" that repeats the
  reply says nothing new and counts by its type.
- Feedback of a tenant other than the message's is ignored, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.data import Filters
from finetune_assets.corpus.personal_data import DEFAULT_REGIONS, may_hold, residual
from finetune_assets.corpus.schema import FEEDBACK, SIMULATED
from finetune_assets.corpus.scrubbing import USUAL, Regions, regions_of
from finetune_assets.dataset.reading import scan
from finetune_assets.storage import Store, read_json

CORRECTED, POSITIVE, SATISFIED, IMPORTED = "corrected", "positive", "satisfied", "imported"
SYNTHETIC = "synthetic"
SOURCES: tuple[str, ...] = (CORRECTED, POSITIVE, SATISFIED, IMPORTED, SYNTHETIC)
"""Best first; of two near-duplicates the better source survives."""

UNUSABLE = ("tenant_excluded", "no_consent", "simulated")
"""Reasons for which a message is of no use whatever, not even as a bad example."""
FEEDBACK_COLUMNS = ("feedback_id", "tenant_id", "message_id", "feedback_type", "expected_response", "created_at")


@dataclass(frozen=True)
class Judged:
    """What feedback says: `messages` has message_id, verdict (positive, negative, null), expected (null: no correction)."""

    messages: pl.DataFrame
    read: int
    ignored: dict[str, int]
    conflicts: dict[str, int]
    """Messages on which people disagree: both thumbs, several corrections, a correction and praise."""


def tenants_of(store: Store, assistant: Assistant) -> list[str]:
    """The tenants whose feedback is this assistant's, as the corpus last saw them; sorted."""
    if assistant.select.tenant is not None:
        return [assistant.select.tenant]
    known: dict[str, str] = read_json(store.tenants) if store.tenants.exists() else {}
    excluded = set(assistant.filters.exclude_tenants)
    return sorted(t for t, vertical in known.items() if vertical == assistant.select.vertical and t not in excluded)


def read_feedback(store: Store) -> pl.DataFrame:
    """All feedback, whatever its week: it may come long after its message."""
    lazy = scan(store, "feedback", store.weeks("feedback"))
    if lazy is None:
        return pl.DataFrame(schema=FEEDBACK).select(FEEDBACK_COLUMNS)
    return lazy.select(FEEDBACK_COLUMNS).collect()


def judge(examples: pl.DataFrame, feedback: pl.DataFrame, tenants: list[str]) -> Judged:
    """One verdict for each message that has feedback, by the rules above; only feedback of `tenants`, or about them, is read."""
    owners = examples.select("message_id", "reply", owner="tenant_id")
    joined = feedback.join(owners, on="message_id", how="left")
    mismatch = (pl.col("owner") != pl.col("tenant_id")).fill_null(False)
    joined = joined.filter(pl.col("tenant_id").is_in(tenants) | mismatch)
    no_example = pl.col("owner").is_null()
    ignored = joined.select(no_example=no_example.sum(), tenant_mismatch=mismatch.sum()).row(0, named=True)
    used = joined.filter(~no_example & ~mismatch).with_columns(
        expected=pl.when(_same(pl.col("expected_response"), pl.col("reply")) | _blank(pl.col("expected_response")))
        .then(None)
        .otherwise(pl.col("expected_response").str.strip_chars())
    )
    newest_first = used.with_columns(negative=pl.col("feedback_type") == "negative").sort(
        "message_id", "created_at", "negative", "expected", descending=[False, True, True, False], nulls_last=True
    )
    thumbs = newest_first.filter(pl.col("feedback_type").is_in(["positive", "negative"]))
    messages = (
        newest_first.select("message_id")
        .unique()
        .join(thumbs.group_by("message_id").agg(verdict=pl.col("feedback_type").first()), on="message_id", how="left")
        .join(
            newest_first.drop_nulls("expected").group_by("message_id").agg(pl.col("expected").first()),
            on="message_id",
            how="left",
        )
        .sort("message_id")
    )
    return Judged(messages, joined.height, {k: int(v) for k, v in ignored.items() if v}, _conflicts(used))


def _conflicts(used: pl.DataFrame) -> dict[str, int]:
    said = used.group_by("message_id").agg(
        good=(pl.col("feedback_type") == "positive").any(),
        bad=(pl.col("feedback_type") == "negative").any(),
        corrections=pl.col("expected").drop_nulls().n_unique(),
    )
    found = said.select(
        both_thumbs=(pl.col("good") & pl.col("bad")).sum(),
        several_corrections=(pl.col("corrections") > 1).sum(),
        corrected_and_praised=((pl.col("corrections") > 0) & pl.col("good")).sum(),
    ).row(0, named=True)
    return {name: int(n) for name, n in found.items() if n}


def _blank(text: pl.Expr) -> pl.Expr:
    return text.is_null() | (text.str.strip_chars() == "")


def _same(one: pl.Expr, other: pl.Expr) -> pl.Expr:
    return (_collapsed(one) == _collapsed(other)).fill_null(False)


def _collapsed(text: pl.Expr) -> pl.Expr:
    return text.str.replace_all(r"\s+", " ").str.strip_chars()


def verdicts(examples: pl.DataFrame, judged: Judged, filters: Filters) -> pl.DataFrame:
    """Adds `verdict`, `expected`, `original` (the reply as said), `reply` (the target), `source` and `reason` (null: kept).

    The reasons that are decided here, first one wins: tenant_excluded, no_consent, simulated, negative_feedback, not_satisfied,
    then those of `content`. Residual personal data, splits and near-duplicates come later and need other examples.
    """
    frame = examples.join(judged.messages, on="message_id", how="left", maintain_order="left").with_columns(
        original=pl.col("reply"), reply=pl.coalesce("expected", "reply")
    )
    corrected, positive = pl.col("expected").is_not_null(), (pl.col("verdict") == "positive").fill_null(False)
    negative = (pl.col("verdict") == "negative").fill_null(False) & ~corrected
    least = filters.min_satisfaction
    satisfied = pl.lit(True) if least is None else (pl.col("satisfaction_score") >= least).fill_null(False)
    frame = frame.with_columns(
        source=pl.when(corrected)
        .then(pl.lit(CORRECTED))
        .when(negative)
        .then(None)
        .when(positive)
        .then(pl.lit(POSITIVE))
        .when(pl.col("kind") == IMPORTED)
        .then(pl.lit(IMPORTED))
        .when(satisfied)
        .then(pl.lit(SATISFIED))
        .otherwise(None)
    )
    consent = pl.col("training_consent").fill_null(True)
    rules = [
        ("tenant_excluded", pl.col("tenant_id").is_in(filters.exclude_tenants)),
        ("no_consent", ~consent),
        ("simulated", pl.col("channel") == SIMULATED),
        ("negative_feedback", negative),
        ("not_satisfied", pl.col("source").is_null()),
    ]
    return content(frame.with_columns(reason=_first(rules)), filters)


def _first(rules: list[tuple[str, pl.Expr]]) -> pl.Expr:
    return pl.coalesce(*[pl.when(rule).then(pl.lit(name)) for name, rule in rules])


def content(frame: pl.DataFrame, filters: Filters) -> pl.DataFrame:
    """Fills `reason` by lengths and patterns. A correction passes all but the reply's upper bound and emptiness."""
    corrected = pl.col("source") == CORRECTED
    chars = pl.col("reply").str.len_chars()
    rules = [
        ("reply_empty", pl.col("reply").str.strip_chars() == ""),
        ("reply_too_long", chars > filters.reply_chars[1]),
        ("user_too_short", (pl.col("user_chars") < filters.user_chars[0]) & ~corrected),
        ("user_too_long", (pl.col("user_chars") > filters.user_chars[1]) & ~corrected),
        ("reply_too_short", (chars < filters.reply_chars[0]) & ~corrected),
        ("error_reply" if filters.exclude is None else "excluded_pattern", pl.col("excluded") & ~corrected),
        ("required_pattern_missing", pl.col("unfit") & ~corrected),
    ]
    frame = frame.with_columns(excluded=_excluded(frame, filters), unfit=_unfit(frame, filters.require))
    return frame.with_columns(reason=pl.coalesce("reason", _first(rules))).drop("excluded", "unfit")


def _excluded(frame: pl.DataFrame, filters: Filters) -> pl.Series:
    if filters.exclude is None:
        return frame["error_reply"]
    found = pl.repeat(False, frame.height, eager=True)
    for pattern in filters.exclude:
        found = found | matches(frame["reply"], pattern)
    return found


def _unfit(frame: pl.DataFrame, require: dict[str, str]) -> pl.Series:
    """True where the intent has a pattern that user turn and reply together do not match."""
    unfit = pl.repeat(False, frame.height, eager=True)
    both = frame.select(pl.concat_str("user_text", "reply", separator="\n", ignore_nulls=True)).to_series()
    for intent, pattern in require.items():
        unfit = unfit | ((frame["intent"] == intent).fill_null(False) & ~matches(both, pattern))
    return unfit


def matches(texts: pl.Series, pattern: str) -> pl.Series:
    """Where a regular expression is found, whatever the case. What Rust's linear engine lacks (look-around) runs in Python."""
    try:
        return texts.str.contains(f"(?i){pattern}").fill_null(False)
    except pl.exceptions.ComputeError:
        compiled = re.compile(pattern, re.IGNORECASE)
        return pl.Series([compiled.search(text or "") is not None for text in texts], dtype=pl.Boolean)


def own_contacts(store: Store) -> frozenset[str]:
    """Public contacts of the tenants, which scrubbing left in their texts."""
    known: dict[str, list[str]] = read_json(store.contacts) if store.contacts.exists() else {}
    return frozenset(one for own in known.values() for one in own)


@dataclass(frozen=True)
class Left:
    """What scrubbing left in the texts on purpose: the tenants' own contacts, national numbers of other countries than theirs."""

    contacts: frozenset[str] = frozenset()
    regions: Regions = field(default_factory=lambda: USUAL)

    @classmethod
    def of(cls, store: Store) -> Left:
        """As the corpus was last scrubbed."""
        known: dict[str, list[str]] = read_json(store.regions) if store.regions.exists() else {}
        return cls(own_contacts(store), {whose: tuple(codes) for whose, codes in known.items()})


NOTHING = Left()


def common_regions(store: Store) -> tuple[str, ...]:
    """The countries whose national numbers were looked for in the texts of every tenant."""
    regions = Left.of(store).regions
    tenants: dict[str, str] = read_json(store.tenants) if regions and store.tenants.exists() else {}
    sets = [set(regions_of(regions, tenant, vertical)) for tenant, vertical in tenants.items()]
    return tuple(sorted(set.intersection(*sets))) if sets else DEFAULT_REGIONS


def mark_personal(frame: pl.DataFrame, parts: Iterable[pl.DataFrame], left: Left = NOTHING) -> pl.DataFrame:
    """Sets `reason` to `personal_data_residual` where context or reply still hold a value that the recognisers know. `parts`: the
    rows that are kept so far, with their contexts."""
    held = [part.filter(holds_personal(part, ["reply"], left))["message_id"] for part in parts]
    found = pl.concat([frame["message_id"].clear(), *held])
    if found.is_empty():
        return frame
    bad = pl.col("message_id").is_in(found.implode())
    return frame.with_columns(reason=pl.when(bad).then(pl.lit("personal_data_residual")).otherwise("reason"))


def holds_personal(frame: pl.DataFrame, columns: list[str], left: Left = NOTHING) -> pl.Series:
    """For each row, does its context or one of the text columns hold personal data?"""
    rows = frame.with_row_index("row")
    groups: dict[tuple[str, ...], list[pl.DataFrame]] = {DEFAULT_REGIONS: [rows]}
    if left.regions:
        groups = {}
        for (tenant, vertical), own in rows.partition_by("tenant_id", "vertical", as_dict=True).items():
            groups.setdefault(regions_of(left.regions, str(tenant), str(vertical)), []).append(own)
    holding = [_holding(pl.concat(own), columns, left.contacts, codes) for codes, own in groups.items()]
    found = pl.concat([rows["row"].clear(), *holding])
    return pl.int_range(frame.height, eager=True).is_in(found.implode())


def _holding(rows: pl.DataFrame, columns: list[str], allow: frozenset[str], regions: tuple[str, ...]) -> pl.Series:
    turns = rows.select("row", text=pl.col("context").list.eval(pl.element().struct.field("content"))).explode("text")
    texts = pl.concat([turns, *[rows.select("row", text=column) for column in columns]])
    suspects = texts["text"].unique()
    suspects = suspects.filter(may_hold(suspects))
    bad = suspects.filter(pl.Series([bool(residual([text], regions, allow)) for text in suspects], dtype=pl.Boolean))
    return texts.filter(pl.col("text").is_in(bad.implode()))["row"].unique()
