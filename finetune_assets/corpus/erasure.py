"""Who asked to be forgotten, as keyed hashes; leaving them out of what is read, and taking them out of the stored weeks.

A subject is `u_…`, the pseudonym of a user, or `p_…`, the keyed hash of a conversation's id: nothing else of a person is kept.
`Traces` is what one erasure removes: found by the subject in the store, held in memory, never written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import polars as pl

from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.personal_data import keyed, pseudonym
from finetune_assets.corpus.sources import SourceTables, Tables
from finetune_assets.corpus.staleness import ERASED, counts_of, part_digest, stale_examples
from finetune_assets.errors import SettingsError
from finetune_assets.storage import Store, write_json, write_parquet

_HASHED = re.compile(r"[up]_[0-9a-f]{16}")
ID_COLUMNS = ("conversation_id", "message_id", "feedback_id", "id")
"""Columns of made tables that tell whose a row is, beside `user`."""


# --- subjects


def user_subject(user: str, key: bytes) -> str:
    """The subject of a user id; a pseudonym stands for itself. Raises SettingsError for an empty one."""
    user = user.strip()
    if not user:
        raise SettingsError("--user is empty; give the user's id as the source has it, or the pseudonym u_… of the store.")
    return user if user.startswith("u_") and _HASHED.fullmatch(user) else pseudonym(user, key)


def conversation_subject(conversation: str, key: bytes) -> str:
    """The subject of a conversation id, raw or as it is stored. Raises SettingsError for an empty one."""
    conversation = conversation.strip()
    if not conversation:
        raise SettingsError("--conversation is empty; give the conversation's id as the source or the store has it.")
    return conversation if conversation.startswith("p_") and _HASHED.fullmatch(conversation) else keyed("p", conversation, key)


def conversation_subjects(conversation: str, key: bytes) -> set[str]:
    """Subjects of a conversation of source or store: of its id and, since the router stores a client's id as `TENANT/ID`, of what
    follows the first slash."""
    ids = (conversation.strip(), conversation.partition("/")[2].strip())
    return {conversation_subject(one, key) for one in ids if one}


def key_check(key: bytes) -> str:
    """Tells whether two hashes were made with the same key, and nothing about the key."""
    return keyed("k", "finetune_assets/erasures", key)


def hashed_id(value: str, key: bytes) -> str:
    """A keyed hash of a message's or feedback's id, by which a tombstone knows it again."""
    return keyed("m", value, key)


# --- the source


@dataclass(frozen=True)
class Erased:
    """Whom no build may read."""

    subjects: frozenset[str] = frozenset()
    key: bytes = field(default=b"", repr=False)

    def leave_out(self, source: SourceTables) -> SourceTables:
        """The source without their rows."""
        if not self.subjects:
            return source
        return source.without(partial(_without, subjects=self.subjects, key=self.key), self.theirs)

    def theirs(self, stored: pl.DataFrame) -> pl.Series:
        """Which stored conversations are theirs, by user or id."""
        users, hashes = _parted(self.subjects)
        of_talks = _hits(stored["conversation_id"], hashes, partial(conversation_subjects, key=self.key))
        return _in(stored["user"], users) | of_talks


def _without(tables: Tables, subjects: Collection[str], key: bytes) -> Tables:
    """Leaves out the subjects' conversations, and the messages and feedback that belong to them."""
    users, hashes = _parted(subjects)
    ids = _stripped(tables.conversations, "conversation_id")
    theirs = _hits(_stripped(tables.conversations, "user_id"), users, lambda user: {user_subject(user, key)})
    gone = set(ids.filter(theirs).drop_nulls())
    for frame in (tables.conversations, tables.messages, tables.feedback):
        column = _stripped(frame, "conversation_id")
        gone |= set(column.filter(_hits(column, hashes, partial(conversation_subjects, key=key))).drop_nulls())
    if not gone:
        return tables
    said = _in(_stripped(tables.messages, "conversation_id"), gone)
    messages = set(_stripped(tables.messages, "message_id").filter(said).drop_nulls())
    judged = _in(_stripped(tables.feedback, "conversation_id"), gone) | _in(_stripped(tables.feedback, "message_id"), messages)
    return replace(
        tables,
        conversations=tables.conversations.filter(~_in(ids, gone)),
        messages=tables.messages.filter(~said),
        feedback=tables.feedback.filter(~judged),
    )


def conversations_in(source: SourceTables, subject: str, key: bytes) -> int:
    """How many conversations of a subject a source has. Raises SourceError."""
    users, hashes = _parted([subject])
    found = 0
    try:
        for part in source.of("conversations"):
            for frame, _ in part.read():
                theirs = _hits(_stripped(frame, "user_id"), users, lambda user: {user_subject(user, key)})
                theirs |= _hits(_stripped(frame, "conversation_id"), hashes, partial(conversation_subjects, key=key))
                found += int(theirs.sum())
    finally:
        source.close()
    return found


def _parted(subjects: Collection[str]) -> tuple[frozenset[str], frozenset[str]]:
    users = frozenset(subject for subject in subjects if subject.startswith("u_"))
    return users, frozenset(subjects) - users


def _stripped(frame: pl.DataFrame, column: str) -> pl.Series:
    return frame[column].cast(pl.String).str.strip_chars()


def _in(values: pl.Series, wanted: Collection[str]) -> pl.Series:
    return values.is_in(pl.Series(sorted(wanted), dtype=pl.String).implode()).fill_null(False)


def _hits(values: pl.Series, subjects: frozenset[str], subjects_of: Callable[[str], set[str]]) -> pl.Series:
    """Where a subject of a value is one of those asked for; each distinct value is hashed once."""
    if not subjects:
        return pl.repeat(False, len(values), eager=True)
    return _in(values, [value for value in values.unique().drop_nulls() if value and subjects_of(value) & subjects])


# --- the store


@dataclass(frozen=True)
class Traces:
    """What of one subject is in the store: ids as they are stored, and texts."""

    subject: str
    conversations: frozenset[str] = frozenset()
    messages: frozenset[str] = frozenset()
    feedback: frozenset[str] = frozenset()
    texts: frozenset[str] = field(default=frozenset(), repr=False)
    rows: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])  # table -> week -> rows

    @property
    def ids(self) -> frozenset[str]:
        """All ids."""
        return self.conversations | self.messages | self.feedback

    def weeks(self, table: str) -> list[str]:
        """Weeks of a corpus table that hold rows of theirs."""
        return sorted(self.rows.get(table, {}))

    def count(self, table: str) -> int:
        """Rows of a corpus table."""
        return sum(self.rows.get(table, {}).values())

    def mine(self, frame: pl.DataFrame) -> pl.Series:
        """Which rows of a made table are theirs, by whatever id columns it has."""
        hit = pl.repeat(False, frame.height, dtype=pl.Boolean, eager=True)
        if "user" in frame.columns and frame.schema["user"] == pl.String:
            hit |= (frame["user"] == self.subject).fill_null(False)
        for column in ID_COLUMNS:
            if column in frame.columns and frame.schema[column] == pl.String:
                hit |= _in(frame[column], self.ids)
        return hit

    def without(self, frame: pl.DataFrame) -> pl.DataFrame:
        """A made table without their rows, and without their ids in what is said of other rows (twins)."""
        frame = frame.filter(~self.mine(frame))
        if "kept_message_id" in frame.columns:
            named = _in(frame["kept_message_id"], self.messages)
            frame = frame.with_columns(pl.when(named).then(None).otherwise("kept_message_id").alias("kept_message_id"))
        if "replaced" in frame.columns:
            others = pl.element().filter(~pl.element().is_in(pl.Series(sorted(self.messages), dtype=pl.String).implode()))
            frame = frame.with_columns(pl.col("replaced").list.eval(others))
        return frame


def find_traces(store: Store, subject: str, key: bytes, lineages: Iterable[Path] = ()) -> Traces:
    """Looks through the stored weeks, and the given Parquet files with lineage, for everything of a subject; writes nothing."""
    conversations: set[str] = set()
    places = [*_parts(store, "conversations"), *_parts(store, "examples"), *lineages]
    for path in places:
        names = [name for name in ("conversation_id", "user") if name in pl.read_parquet_schema(path)]
        frame = pl.read_parquet(path, columns=names)
        if "conversation_id" in names:
            conversations |= set(frame["conversation_id"].filter(_theirs(frame, subject, key)).drop_nulls())
    found = Traces(subject, frozenset(conversations))
    messages, texts, rows = set[str](), set[str](), dict[str, dict[str, int]]()
    for path in _parts(store, "conversations"):
        frame = _matching(path, found)
        if frame.height:
            rows.setdefault("conversations", {})[_week(path)] = frame.height
            said = frame.explode("messages").drop_nulls("messages").unnest("messages")
            rows.setdefault("messages", {})[_week(path)] = said.height
            messages |= set(said["message_id"])
            texts |= set(said["content"].drop_nulls())
    for path in [*_parts(store, "examples"), *lineages]:
        frame = _matching(path, found, ("message_id",))
        messages |= set(frame["message_id"].drop_nulls()) if "message_id" in frame.columns else set()
        if path.is_relative_to(store.home / "corpus") and frame.height:
            rows.setdefault("examples", {})[_week(path)] = frame.height
    found = replace(found, messages=frozenset(messages))
    feedback: set[str] = set()
    for path in _parts(store, "feedback"):
        frame = _matching(path, found)
        if frame.height:
            rows.setdefault("feedback", {})[_week(path)] = frame.height
            feedback |= set(frame["feedback_id"])
            for column in ("expected_response", "comment"):
                texts |= set(frame[column].drop_nulls())
    found = replace(found, feedback=frozenset(feedback))
    for path in sorted((store.home / "corpus" / "rejected").glob("week=*/*.parquet")):
        frame = pl.read_parquet(path)
        hits = int((found.mine(frame) | _theirs(frame, subject, key)).sum())
        if hits:
            week = rows.setdefault("rejected", {})
            week[_week(path)] = week.get(_week(path), 0) + hits
    return replace(found, texts=frozenset(texts - _said_by_others(store, texts, found)), rows=rows)


def _said_by_others(store: Store, texts: Collection[str], traces: Traces) -> set[str]:
    """Which of the texts stand in other people's rows too (a greeting, a stock reply): nobody is known by them."""
    own: dict[str, set[str]] = {}
    for text in texts:
        own.setdefault(text.strip(), set()).add(text)
    shared: set[str] = set()
    for path in [*_parts(store, "conversations"), *_parts(store, "feedback")] if own else ():
        names = ("user", *ID_COLUMNS, "messages", "expected_response", "comment")
        frame = pl.read_parquet(path, columns=[name for name in names if name in pl.read_parquet_schema(path)])
        frame = frame.filter(~traces.mine(frame))
        said = [frame[name] for name in ("expected_response", "comment") if name in frame.columns]
        said += [frame["messages"].explode().drop_nulls().struct.field("content")] if "messages" in frame.columns else []
        for column in said:
            stripped = column.str.strip_chars()
            shared |= set(stripped.filter(_in(stripped, own)))
    return {text for one in shared for text in own[one]}


def _parts(store: Store, table: str) -> list[Path]:
    return sorted((store.home / "corpus" / table).glob("week=*/*.parquet"))


def _week(path: Path) -> str:
    return path.parent.name.removeprefix("week=")


def _theirs(frame: pl.DataFrame, subject: str, key: bytes) -> pl.Series:
    """Rows of a subject, by the hash alone."""
    column = "user" if subject.startswith("u_") else "conversation_id"
    if column not in frame.columns:
        return pl.repeat(False, frame.height, dtype=pl.Boolean, eager=True)
    if column == "user":
        return (frame["user"] == subject).fill_null(False)
    return _hits(frame["conversation_id"], frozenset([subject]), partial(conversation_subjects, key=key))


def _matching(path: Path, traces: Traces, only: tuple[str, ...] = ()) -> pl.DataFrame:
    """Their rows of a file; `only` limits the columns that are read."""
    schema = pl.read_parquet_schema(path)
    ids = [name for name in ("user", *ID_COLUMNS) if name in schema]
    hits = traces.mine(pl.read_parquet(path, columns=ids))
    if not hits.any():
        return pl.DataFrame(schema={name: schema[name] for name in schema})
    return pl.read_parquet(path, columns=[name for name in only if name in schema] or None).filter(hits)


def take_out(store: Store, traces: Traces, key: bytes) -> None:
    """Removes their rows from every stored week. Examples and feedback go before the conversations that name them.

    A week whose conversations or feedback changed is stale afterwards: it says no more what the source (with them) says.
    """
    root = store.home / "corpus"
    tables = [path.name for path in root.glob("*") if path.is_dir()]
    for table in sorted(tables, key=lambda name: (name == "conversations", name != "rejected", name)):
        for path in sorted((root / table).glob("week=*/*.parquet")):
            changed = _take_out_of(path, traces, key)
            if path.name == "part.parquet" and table in ("conversations", "feedback"):
                _recount(store, table, _week(path), changed)
    changed = [
        week for week in stale_examples(store) if counts_of(store.corpus("conversations", week)).get("source_digest") == ERASED
    ]
    build_examples(store, [week for week in changed if counts_of(store.corpus("examples", week))])


def _take_out_of(path: Path, traces: Traces, key: bytes) -> bool:
    schema = pl.read_parquet_schema(path)
    ids = [name for name in ("user", *ID_COLUMNS, "kept_message_id", "replaced") if name in schema]
    head = pl.read_parquet(path, columns=ids) if ids else pl.DataFrame()
    theirs = traces.mine(head) | _theirs(head, traces.subject, key)
    if not theirs.any() and traces.without(head).equals(head):
        return False
    write_parquet(path, traces.without(pl.read_parquet(path).filter(~theirs)))
    return True


def _recount(store: Store, table: str, week: str, changed: bool) -> None:
    """Numbers and digest of a week whose rows were taken out, now or by a run that was killed before it counted."""
    folder = store.corpus(table, week)
    counts = counts_of(folder)
    part = folder / "part.parquet"
    if not counts:
        return
    reasons: dict[str, dict[str, int]] = {name: {} for name in counts["kept"]}
    dropped: dict[str, int] = dict.fromkeys(counts["kept"], 0)
    rejected = store.corpus("rejected", week) / f"{table}.parquet"
    if rejected.exists():
        for name, reason, action in pl.read_parquet(rejected).select("table", "reason", "action").iter_rows():
            reasons[name][reason] = reasons[name].get(reason, 0) + 1
            dropped[name] += action == "dropped"
    if not changed and dropped == counts["dropped"] and counts.get("part_digest") == part_digest(part):
        return
    frame = pl.read_parquet(part)
    kept = {table: frame.height}
    if table == "conversations":
        kept["messages"] = int(frame["messages"].list.len().sum())
    write_json(
        folder / "counts.json",
        {
            **counts,
            "kept": kept,
            "dropped": dropped,
            "read": {name: kept[name] + dropped[name] for name in kept},
            "rejected_by_reason": reasons,
            "source_digest": ERASED,
            "part_digest": part_digest(part),
            "part_bytes": part.stat().st_size,
        },
    )


def left_over(store: Store, traces: Traces, key: bytes) -> Iterator[Path]:
    """Files of the corpus that still hold a row of theirs."""
    for path in sorted((store.home / "corpus").rglob("*.parquet")):
        schema = pl.read_parquet_schema(path)
        ids = [name for name in ("user", *ID_COLUMNS) if name in schema]
        frame = pl.read_parquet(path, columns=ids) if ids else pl.DataFrame()
        if (traces.mine(frame) | _theirs(frame, traces.subject, key)).any():
            yield path
