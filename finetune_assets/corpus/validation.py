"""Decides for every source row: kept, repaired or dropped, with a reason, and which week it belongs to. Nothing is stored here.

Rules, the first that holds counts:
- every table: `id_null`, `id_too_long`, `text_broken` (NUL or U+FFFD), `time_naive`, `time_absurd` (before 2000, after 2099),
  `<column>_invalid`, `<column>_null`
- conversations: `tenant_null`, `label_too_long`, `conversation_ambiguous` (valid rows of several tenants: all are dropped),
  `conversation_id_repeated`, `conversation_empty` (no valid message)
- messages: `role_unknown`, `content_null`, `content_empty`, `conversation_missing`, `conversation_rejected`,
  `message_id_repeated`, and what is wrong with a row of an imported file (`forms.REASONS`)
- feedback: `feedback_type_unknown`, `message_missing`, `message_rejected`, `conversation_mismatch`, `tenant_mismatch`,
  `feedback_on_user_message`, `feedback_id_repeated`
- repaired, the value becomes null: a score or rating outside 1..5 (`…_out_of_range`, `…_invalid`), an `ended_at` that makes no
  sense or lies before `started_at`, a broken or too long channel, intent or comment, an unknown `kind`; an unreadable
  `training_consent` becomes false
Of repeated ids the row with the earliest time stays, ties by content: the order of rows, files and sources never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import polars as pl

from finetune_assets.corpus.schema import FEEDBACK_TYPES, KINDS, MAX_ID, MAX_LABEL, ROLES, UNKNOWN_WEEK

IDS = {"conversations": "conversation_id", "messages": "message_id", "feedback": "feedback_id"}
_BROKEN = "[\x00\ufffd]"
_VISIBLE = r"[^\s\p{Z}\p{Cc}\p{Cf}]"


@dataclass(frozen=True)
class Validated:
    """Kept rows with their `week` and the raw `user_id` of their conversation; `rejected` holds dropped and repaired ones."""

    conversations: pl.DataFrame
    messages: pl.DataFrame
    feedback: pl.DataFrame
    rejected: pl.DataFrame  # table, id (raw), reason, detail, action, week, user_id (raw)
    read: pl.DataFrame  # table, week, rows


@dataclass(frozen=True)
class _Rule:
    """A reason, what it says, and for which rows it holds (null: it does not). `column`: what a repair sets to `becomes`."""

    reason: str
    detail: str
    when: pl.Expr
    column: str = ""
    becomes: bool | None = None


class HasTables(Protocol):
    """Rows of the three tables, as `cells.typed` makes them."""

    @property
    def conversations(self) -> pl.DataFrame: ...
    @property
    def messages(self) -> pl.DataFrame: ...
    @property
    def feedback(self) -> pl.DataFrame: ...


def validate(tables: HasTables) -> Validated:
    """Applies every rule to every row. Rows come out in a stable order."""
    conversations = _conversations(tables.conversations)
    known = _known(conversations)
    messages = _messages(tables.messages, known)
    with_message = known["conversation_id"].gather(messages["talk"].filter(messages["reason"].is_null()).unique())
    empty = conversations["reason"].is_null() & ~conversations["conversation_id"].is_in(with_message.implode())
    conversations = _marked(conversations, empty.arg_true(), "conversation_empty", "no valid message belongs to it")
    feedback = _feedback(tables.feedback, messages, known)
    judged = {"conversations": conversations, "messages": messages, "feedback": feedback}
    kept: dict[str, pl.DataFrame] = {}
    rejected: list[pl.DataFrame] = []
    for table, frame in judged.items():
        rejected.append(_rejected(table, frame.filter(pl.col("reason").is_not_null()), "dropped"))
        repairs = _needed(_repairs(table), frame)
        rejected += _listed_repairs(table, frame, repairs)
        kept[table] = _repaired(table, frame, repairs)
    read = [
        frame.group_by("week").len("rows").select(pl.lit(table).alias("table"), "week", "rows") for table, frame in judged.items()
    ]
    everything = pl.concat(rejected)
    return Validated(**kept, rejected=everything.sort(everything.columns, nulls_last=True), read=pl.concat(read))


def set_aside(tables: HasTables) -> dict[str, pl.DataFrame]:
    """What `rejected` says of each row, in the order of the tables; `reason` is null where nothing is wrong with it."""
    conversations = _conversations(tables.conversations)
    known = _known(conversations)
    messages = _messages(tables.messages, known)
    judged = {"conversations": conversations, "messages": messages, "feedback": _feedback(tables.feedback, messages, known)}
    return {table: _rejected(table, frame, "dropped") for table, frame in judged.items()}


def mondays(times: pl.Series) -> pl.Series:
    """The week of each time: its Monday as YYYY-MM-DD, UTC."""
    days = times.dt.truncate("1w").dt.date()
    few = days.drop_nulls().unique()  # to write each day once is a fortieth of writing it for every row
    return days.replace_strict(few, few.cast(pl.String), default=None, return_dtype=pl.String)


# --- what all tables share


def _ids(frame: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """Ids and labels without surrounding white space; an empty one is null. Rows get their number."""
    return frame.with_columns(pl.col(*columns).str.strip_chars().replace("", None)).with_row_index("row")


def _missing(column: str, reason: str | None = None) -> _Rule:
    return _Rule(reason or f"{column}_null", f"{column} is null or blank", pl.col(column).is_null())


def _too_long(columns: Sequence[str], reason: str, most: int) -> list[_Rule]:
    return [_Rule(reason, f"{name} is longer than {most} characters", pl.col(name).str.len_chars() > most) for name in columns]


def _broken(columns: Sequence[str]) -> list[_Rule]:
    return [
        _Rule("text_broken", f"{name} holds NUL or undecodable characters", pl.col(name).str.contains(_BROKEN))
        for name in columns
    ]


def _time(column: str) -> list[_Rule]:
    problem = pl.col(f"{column}_problem")
    return [
        _Rule("time_naive", f"{column} has no time zone", problem == "naive"),
        _Rule("time_absurd", f"{column} is before 2000 or after 2099", problem == "absurd"),
        _Rule(f"{column}_invalid", f"{column} is no time", problem == "invalid"),
    ]


def _judge(frame: pl.DataFrame, rules: Sequence[_Rule]) -> pl.DataFrame:
    """Adds `reason` and `detail` of the first rule that holds; null where none does."""
    first = pl.coalesce(pl.when(rule.when).then(pl.lit(place, pl.UInt32)) for place, rule in enumerate(rules))
    broken = frame.select(first.alias("rule")).to_series()
    texts = (pl.Series([getattr(rule, name) for rule in rules], dtype=pl.String) for name in ("reason", "detail"))
    return frame.with_columns(text.gather(broken).alias(name) for text, name in zip(texts, ("reason", "detail"), strict=True))


def _marked(frame: pl.DataFrame, at: pl.Series, reason: str, detail: str) -> pl.DataFrame:
    """Sets `reason` and `detail` of some rows."""
    return frame.with_columns(frame["reason"].clone().scatter(at, reason), frame["detail"].clone().scatter(at, detail))


def _twins(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """The valid rows that share an id."""
    ids = frame[column].filter(frame["reason"].is_null())
    hashes = ids.hash()
    ordered = hashes.sort()  # a third of the time of grouping the ids
    some = ids.filter(hashes.is_in(ordered.filter(ordered == ordered.shift(1)).unique().implode()))
    repeated = some.filter(some.is_duplicated())
    if repeated.is_empty():
        return frame.clear()
    return frame.filter(pl.col("reason").is_null() & pl.col(column).is_in(repeated.unique().implode()))


def _mark_repeated(frame: pl.DataFrame, twins: pl.DataFrame, column: str, time: str) -> pl.DataFrame:
    """Drops all but the earliest of the rows that share an id."""
    if twins.is_empty():
        return frame
    content = pl.struct(pl.exclude("row", "talk")).struct.json_encode().alias("_content")
    ordered = twins.with_columns(content).sort(column, time, "_content")
    losers = ordered.filter(~pl.col(column).is_first_distinct())["row"]
    detail = f"another row with this {column} is earlier, or equal"
    return _marked(frame, losers, f"{column}_repeated", detail)


def _mark_ambiguous(frame: pl.DataFrame, twins: pl.DataFrame) -> pl.DataFrame:
    """Drops every row of an id that stands for several tenants: nobody knows whose its messages are."""
    if twins.is_empty():
        return frame
    detail = "its id stands for conversations of several tenants; give each source ids of its own"
    return _marked(frame, twins["row"], "conversation_ambiguous", detail)


def _rejected(table: str, rows: pl.DataFrame, action: str) -> pl.DataFrame:
    return rows.select(
        pl.lit(table).alias("table"),
        pl.col(IDS[table]).alias("id"),
        "reason",
        "detail",
        pl.lit(action).alias("action"),
        "week",
        "user_id",
        "conversation_id",
    )


# --- the three tables


def _conversations(raw: pl.DataFrame) -> pl.DataFrame:
    labels = ("tenant_id", "vertical", "channel")
    frame = _ids(raw, ["conversation_id", "user_id", *labels])
    rules = [
        _missing("conversation_id", "id_null"),
        *_too_long(("conversation_id", "user_id"), "id_too_long", MAX_ID),
        *_broken(("conversation_id", "user_id", "tenant_id", "vertical")),
        _missing("tenant_id", "tenant_null"),
        _missing("vertical"),
        *_too_long(("tenant_id", "vertical"), "label_too_long", MAX_LABEL),
        *_time("started_at"),
        _missing("started_at"),
    ]
    frame = frame.with_columns(mondays(frame["started_at"]).fill_null(UNKNOWN_WEEK).alias("week"))
    frame = _judge(frame, rules)
    twins = _twins(frame, "conversation_id")
    several = pl.col("tenant_id").n_unique().over("conversation_id") > 1
    frame = _mark_ambiguous(frame, twins.filter(several))
    return _mark_repeated(frame, twins.filter(~several), "conversation_id", "started_at")


def _known(conversations: pl.DataFrame) -> pl.DataFrame:
    """One row for each conversation id in the source: `accepted`, and week, user and tenant of the accepted row (else one).
    `talk` numbers the ids in their order."""
    frame = conversations.filter(pl.col("conversation_id").is_not_null()).select(
        "conversation_id",
        pl.col("reason").is_null().alias("accepted"),
        pl.col("week").alias("its_week"),
        "user_id",
        pl.col("tenant_id").alias("its_tenant"),
    )
    order = ["conversation_id", "accepted", "its_week", "user_id", "its_tenant"]
    ordered = frame.sort(order, descending=[False, True, False, False, False], nulls_last=True)
    return ordered.unique("conversation_id", keep="first", maintain_order=True).with_row_index("talk")


def _messages(raw: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    frame = _ids(raw, ["message_id", "conversation_id", "intent"])
    odd = (~frame["role"].is_in(ROLES)).arg_true()
    frame = frame.with_columns(frame["role"].scatter(odd, frame["role"].gather(odd).str.strip_chars().str.to_lowercase()))
    run = frame["conversation_id"].rle_id()  # a conversation's messages mostly stand together: its id is looked up once
    few = frame.select("conversation_id").filter(run.is_first_distinct())
    frame = frame.hstack(few.join(known, on="conversation_id", how="left", maintain_order="left").drop("conversation_id")[run])
    rules = [
        _missing("message_id", "id_null"),
        *_too_long(("message_id", "conversation_id"), "id_too_long", MAX_ID),
        *_broken(("message_id", "conversation_id")),
        _missing("conversation_id"),
        _Rule("role_unknown", f"role is none of {', '.join((*ROLES, 'tool'))}", ~pl.col("role").is_in(ROLES).fill_null(False)),
        _Rule("content_null", "content is null", pl.col("content").is_null()),
        *_broken(("content",)),
        _Rule("content_empty", "content is empty or white space", ~pl.col("content").str.contains(_VISIBLE)),
        *_time("created_at"),
        _missing("created_at"),
        _Rule("conversation_missing", "its conversation is not in the source", pl.col("accepted").is_null()),
        _Rule("conversation_rejected", "its conversation was dropped", ~pl.col("accepted")),
    ]
    told = pl.col("problem").str.extract_groups(r"^(?<reason>[a-z_]+): (?<detail>.*)$").struct
    judged = _judge(frame, rules).with_columns(
        *(pl.coalesce(told.field(name), name).alias(name) for name in ("reason", "detail"))
    )
    frame = _mark_repeated(judged, _twins(judged, "message_id"), "message_id", "created_at")
    own = mondays(frame["created_at"])
    week = pl.when(pl.col("reason").is_null()).then("its_week").otherwise(pl.coalesce(own, "its_week", pl.lit(UNKNOWN_WEEK)))
    return frame.with_columns(week.alias("week"))


def _feedback(raw: pl.DataFrame, messages: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    frame = _ids(raw, ["feedback_id", "tenant_id", "conversation_id", "message_id", "expected_response", "comment"])
    frame = frame.with_columns(pl.col("feedback_type").str.strip_chars().str.to_lowercase())
    messages = messages.filter(pl.col("message_id").is_in(frame["message_id"].drop_nulls().unique().implode()).fill_null(False))
    judged = messages.filter(pl.col("reason").is_null()).select(
        "message_id",
        pl.col("conversation_id").alias("its_conversation"),
        pl.col("role").alias("its_role"),
        "its_tenant",
        "user_id",
    )
    frame = frame.join(judged, on="message_id", how="left", maintain_order="left")
    there = pl.col("message_id").is_in(messages["message_id"].drop_nulls().unique().implode())
    rules = [
        _missing("feedback_id", "id_null"),
        *_too_long(("feedback_id", "conversation_id", "message_id"), "id_too_long", MAX_ID),
        *_broken(("feedback_id", "tenant_id", "conversation_id", "message_id", "expected_response")),
        _missing("tenant_id", "tenant_null"),
        _missing("message_id"),
        _Rule(
            "feedback_type_unknown",
            f"feedback_type is none of {', '.join(FEEDBACK_TYPES)}",
            ~pl.col("feedback_type").is_in(FEEDBACK_TYPES).fill_null(False),
        ),
        *_time("created_at"),
        _missing("created_at"),
        _Rule("message_missing", "its message is not in the source", ~there),
        _Rule("message_rejected", "its message was dropped", pl.col("its_role").is_null()),
        _Rule(
            "conversation_mismatch",
            "its message belongs to another conversation",
            pl.col("conversation_id") != pl.col("its_conversation"),
        ),
        _Rule("tenant_mismatch", "its message belongs to another tenant", pl.col("tenant_id") != pl.col("its_tenant")),
        _Rule("feedback_on_user_message", "its message is the user's", pl.col("its_role") == "user"),
    ]
    judged = _judge(frame, rules)
    frame = _mark_repeated(judged, _twins(judged, "feedback_id"), "feedback_id", "created_at")
    weeks = known.select("conversation_id", "its_week", pl.col("user_id").alias("its_user"))
    frame = frame.join(weeks, on="conversation_id", how="left", maintain_order="left")
    return frame.with_columns(
        pl.coalesce(mondays(frame["created_at"]), "its_week", pl.lit(UNKNOWN_WEEK)).alias("week"),
        pl.coalesce("user_id", "its_user").alias("user_id"),
        pl.coalesce("conversation_id", "its_conversation").alias("conversation_id"),
    )


# --- repairs


def _score(column: str) -> list[_Rule]:
    problem = pl.col(f"{column}_problem")
    return [
        _Rule(
            f"{column}_out_of_range", f"{column} is no whole number from 1 to 5; set to null", problem == "out_of_range", column
        ),
        _Rule(f"{column}_invalid", f"{column} is no number; set to null", problem == "invalid", column),
    ]


def _text_repairs(column: str, most: int | None = None) -> list[_Rule]:
    rules = [*_broken((column,)), *(_too_long((column,), f"{column}_too_long", most) if most else [])]
    return [_Rule(rule.reason, f"{rule.detail}; set to null", rule.when, column) for rule in rules]


def _repairs(table: str) -> list[_Rule]:
    if table == "conversations":
        late = pl.col("ended_at") < pl.col("started_at")
        return [
            *_score("satisfaction_score"),
            *(_Rule(rule.reason, f"{rule.detail}; set to null", rule.when, "ended_at") for rule in _time("ended_at")),
            _Rule("ended_before_started", "ended_at is before started_at; set to null", late, "ended_at"),
            *_text_repairs("channel", MAX_LABEL),
            _Rule("kind_unknown", f"kind is none of {', '.join(KINDS)}; set to null", ~pl.col("kind").is_in(KINDS), "kind"),
            _Rule(
                "training_consent_invalid",
                "training_consent is neither true nor false; set to false",
                pl.col("training_consent_problem").is_not_null(),
                "training_consent",
                False,
            ),
        ]
    return _text_repairs("intent", MAX_LABEL) if table == "messages" else [*_score("rating"), *_text_repairs("comment")]


_KEPT = {
    "conversations": (
        *("conversation_id", "tenant_id", "user_id", "vertical", "channel", "satisfaction_score", "training_consent"),
        *("kind", "started_at", "ended_at", "week"),
    ),
    "messages": ("message_id", "conversation_id", "role", "content", "intent", "created_at", "week", "user_id"),
    "feedback": (
        *("feedback_id", "tenant_id", "conversation_id", "message_id", "feedback_type", "rating", "expected_response", "comment"),
        *("created_at", "week", "user_id"),
    ),
}
_ORDER = {"conversations": ["started_at", "conversation_id"], "feedback": ["created_at", "feedback_id"]}


def _needed(rules: list[_Rule], frame: pl.DataFrame) -> list[_Rule]:
    """Those that hold for some row."""
    found = frame.select(rule.when.any().alias(str(place)) for place, rule in enumerate(rules)).row(0)
    return [rule for rule, holds in zip(rules, found, strict=True) if holds]


def _listed_repairs(table: str, frame: pl.DataFrame, rules: Sequence[_Rule]) -> list[pl.DataFrame]:
    """One rejected row for each repair of a row that is kept (or would be, if its conversation had a message)."""
    fine = pl.col("reason").is_null() | (pl.col("reason") == "conversation_empty")
    listed: list[pl.DataFrame] = []
    for rule in rules:
        rows = frame.filter(fine & rule.when).with_columns(
            pl.lit(rule.reason).alias("reason"), pl.lit(rule.detail).alias("detail")
        )
        listed.append(_rejected(table, rows, "repaired"))
    return listed


def _repaired(table: str, frame: pl.DataFrame, rules: Sequence[_Rule]) -> pl.DataFrame:
    """The kept rows with bad values replaced, in stable order."""
    changes: dict[str, pl.Expr] = {}
    for rule in rules:
        before = changes.get(rule.column, pl.col(rule.column))
        changes[rule.column] = pl.when(rule.when).then(pl.lit(rule.becomes, dtype=frame.schema[rule.column])).otherwise(before)
    columns = [*_KEPT[table], *(["talk"] if table == "messages" else [])]
    kept = frame.with_columns(**changes).select(columns).filter(frame["reason"].is_null())
    return _in_turn(kept) if table == "messages" else kept.sort(*_ORDER[table])


def _in_turn(messages: pl.DataFrame) -> pl.DataFrame:
    """Sorted by conversation (`talk`, which goes) and `turn_order`. One column is sorted after the other, and only what happened
    in one instant is looked at closer: sorting by two columns at once takes half as long again, by all of it five times."""
    rows = messages.select("talk", "created_at").with_row_index("at")
    rows = rows.sort("created_at", maintain_order=True).sort("talk", maintain_order=True)
    again = (pl.col("talk") == pl.col("talk").shift(1)) & (pl.col("created_at") == pl.col("created_at").shift(1))
    tied = rows.select((again | again.shift(-1)).fill_null(False)).to_series()
    if tied.any():
        few = rows.filter(tied)
        own = messages[few["at"]].with_columns(few["at"]).sort("talk", *turn_order())
        rows = rows.with_columns(rows["at"].scatter(tied.arg_true(), own["at"]))
    return messages.drop("talk")[rows["at"]]


def turn_order() -> tuple[pl.Expr, ...]:
    """The order of a conversation's messages: time; in one instant a counted id's number, else the user before the assistant."""
    number = pl.col("message_id").str.extract(r"^\D*(\d{1,18})$").cast(pl.Int64).fill_null(-1)
    speaker = pl.when(number < 0).then(pl.col("role") == "assistant").otherwise(False)
    return pl.col("created_at"), number, speaker, pl.col("message_id")
