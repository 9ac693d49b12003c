"""`finetune explain`: what became of one message, conversation or feedback row, and why, from the store's own files.

`explain` answers with plain values; `cli/data.py` shows them. Nothing is written. The source is asked only about what the store
does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import polars as pl
from rapidfuzz import fuzz, process

from finetune_assets.corpus.cells import no_rows
from finetune_assets.corpus.erasure import Erased, conversation_subjects, hashed_id
from finetune_assets.corpus.parts import TIMES
from finetune_assets.corpus.personal_data import KINDS, keyed
from finetune_assets.corpus.sources import SourceTables, Tables
from finetune_assets.dataset.fate import Facts, clip, fate, judgements, part_files, rows_of
from finetune_assets.errors import FinetuneError
from finetune_assets.registry import Ledger, erasures
from finetune_assets.storage import Store

NEAREST = 3
_IDS = {"conversations": "conversation_id", "feedback": "feedback_id", "messages": "message_id"}  # the longest table last


@dataclass(frozen=True)
class Asked:
    """What is asked about: an id as the source or the store has it, and the assistants to look at (none: all with a data set)."""

    id: str
    assistants: tuple[str, ...]
    key: bytes

    @property
    def ids(self) -> list[str]:
        """The id as it may be stored: itself, or its keyed hash where it held something personal."""
        return [self.id, keyed("p", self.id, self.key)]


def explain(store: Store, ledger: Ledger, asked: Asked, source: Callable[[], SourceTables]) -> Facts:
    """What became of an id. `kind`: message, conversation, feedback, rejected, erased, unread or unknown."""
    for kind, look in (("message", _message), ("conversation", _conversation), ("feedback", _feedback)):
        found = look(store, asked)
        if found is not None:
            return {"id": asked.id, "kind": kind, **found}
    rejected = _rejected(store, asked.ids)
    if rejected:
        return {"id": asked.id, "kind": "rejected", "rejected": rejected}
    return {"id": asked.id, **_absent(store, ledger, asked, source)}


# --- what is in the corpus


def _message(store: Store, asked: Asked) -> Facts | None:
    """Examples are looked through first: only a message that is none makes it read the conversations."""
    for week, example in rows_of(store, "examples", "message_id", asked.ids):
        talk = next((row for _, row in rows_of(store, "conversations", "conversation_id", [example["conversation_id"]])), None)
        return _of_message(store, asked, week, talk, example)
    for path in part_files(store, "conversations"):
        said = pl.col("messages").list.eval(pl.element().struct.field("message_id").is_in(asked.ids)).list.any()
        frame = pl.scan_parquet(path).filter(said).collect()
        if frame.height:
            return _of_message(store, asked, path.parent.name.removeprefix("week="), frame.row(0, named=True), None)
    return None


def _of_message(store: Store, asked: Asked, week: str, talk: Facts | None, example: Facts | None) -> Facts:
    turns: list[Facts] = talk["messages"] if talk else []
    message = next((turn for turn in turns if turn["message_id"] in asked.ids), None)
    own = str((message or example or {})["message_id"])
    text = str(message["content"] if message else (example or {})["reply"])
    judged = judgements(store, own)
    facts: Facts = {
        "week": week,
        "message_id": own,
        "conversation_id": (talk or example or {})["conversation_id"],
        "tenant_id": (talk or example or {})["tenant_id"],
        "vertical": (talk or example or {})["vertical"],
        "role": message["role"] if message else "assistant",
        "said_at": str(message["created_at"] if message else (example or {})["created_at"]),
        "text": clip(text),
        "scrubbed": sorted({kind for kind in KINDS if re.search(rf"\[{kind.upper()}(?:_\d+)?\]", text)}),
        "repaired": _rejected(store, [own]),
        "feedback": judged,
        "example": example is not None,
    }
    if example is None:
        facts["why"] = _no_example(facts["role"], own, turns)
        return facts
    facts |= {name: example[name] for name in ("intent", "satisfaction_score", "training_consent", "user_chars", "reply_chars")}
    facts["asked"] = clip(str(example["user_text"]))
    facts["assistants"] = [fate(store, name, example, judged) for name in _assistants(store, asked)]
    return facts


def _no_example(role: str, message_id: str, turns: list[Facts]) -> str:
    if role == "user":
        later = next((turn["message_id"] for turn in turns[_place(message_id, turns) :] if turn["role"] == "assistant"), None)
        then = f"it is part of what {later} answers" if later else "nothing answers it"
        return f"A user's message is never a target; {then}."
    return "no_user_turn: nobody had said anything before it, so it answers nothing."


def _place(message_id: str, turns: list[Facts]) -> int:
    return next((place for place, turn in enumerate(turns) if turn["message_id"] == message_id), 0)


def _conversation(store: Store, asked: Asked) -> Facts | None:
    for week, talk in rows_of(store, "conversations", "conversation_id", asked.ids):
        own = str(talk["conversation_id"])
        examples = {row["message_id"]: row for _, row in rows_of(store, "examples", "conversation_id", [own])}
        messages: list[Facts] = []
        for turn in talk["messages"]:
            example = examples.get(turn["message_id"])
            judged = judgements(store, turn["message_id"]) if example else []
            fates = [fate(store, name, example, judged) for name in _assistants(store, asked)] if example else []
            why = None if example else _no_example(turn["role"], turn["message_id"], talk["messages"])
            shown = {"message_id": turn["message_id"], "role": turn["role"], "text": clip(turn["content"])}
            messages.append({**shown, "why": why, "assistants": fates})
        names = ("conversation_id", "tenant_id", "vertical", "satisfaction_score", "training_consent")
        return {"week": week, **{name: talk[name] for name in names}, "messages": messages, "rejected": _rejected(store, [own])}
    return None


def _feedback(store: Store, asked: Asked) -> Facts | None:
    for week, row in rows_of(store, "feedback", "feedback_id", asked.ids):
        about = _message(store, Asked(str(row["message_id"]), asked.assistants, asked.key))
        names = ("feedback_id", "feedback_type", "rating", "expected_response", "message_id", "tenant_id")
        return {"week": week, "at": str(row["created_at"]), **{name: row[name] for name in names}, "message": about}
    return None


def _rejected(store: Store, ids: list[str]) -> list[Facts]:
    """Rows that were set aside or repaired under one of the ids, or belong to such a conversation."""
    found: list[Facts] = []
    for path in sorted((store.home / "corpus" / "rejected").glob("week=*/*.parquet")):
        frame = pl.read_parquet(path)
        columns = [name for name in ("id", "conversation_id") if name in frame.columns]
        rows = frame.filter(pl.any_horizontal(pl.col(name).is_in(ids) for name in columns))
        names = ("table", "id", "reason", "detail", "action")
        week = path.parent.name.removeprefix("week=")
        found += [{"week": week, **{name: row[name] for name in names}} for row in rows.iter_rows(named=True)]
    return found


def _assistants(store: Store, asked: Asked) -> list[str]:
    there = sorted(path.parent.name for path in (store.home / "datasets").glob("*/latest"))
    return list(asked.assistants) or there


# --- what is not in the corpus


def _absent(store: Store, ledger: Ledger, asked: Asked, source: Callable[[], SourceTables]) -> Facts:
    known = erasures.all_erasures(ledger)
    hashed = {hashed_id(one, asked.key) for one in asked.ids}
    subjects = conversation_subjects(asked.id, asked.key)
    for one in known:
        if hashed & one.messages or one.subject in subjects:
            return {
                "kind": "erased",
                "at": one.requested_at.date().isoformat(),
                "why": "its person was erased; no build reads it",
            }
    weeks = store.weeks("conversations")
    looked = [f"{len(weeks)} weeks of the corpus", "rejected rows", f"{len(known)} erasures"]
    try:
        tables = source()
    except FinetuneError as error:
        return {"kind": "unknown", "looked": looked, "source": str(error), "nearest": _nearest(store, asked.id)}
    looked.append("the source")
    try:
        found = next(((table, row) for table, column in _IDS.items() for row in _rows(tables, table, column, {asked.id})), None)
        if found is None:
            return {"kind": "unknown", "looked": looked, "nearest": _nearest(store, asked.id)}
        if _left_out(Erased(frozenset(one.subject for one in known), asked.key).leave_out(tables), *found):
            return {"kind": "erased", "at": "", "why": "the source still holds it, but its person was erased: no build reads it"}
    finally:
        tables.close()
    table, row = found
    what = f"a {table.removesuffix('s')} of {row[TIMES[table]][0]}"
    return {
        "kind": "unread",
        "why": f"{what} in the source, not read yet: materialise its week (finetune run does)",
        "looked": looked,
    }


def _rows(source: SourceTables, table: str, column: str, ids: Collection[str]) -> Iterator[pl.DataFrame]:
    """Rows of the source with one of the ids, read batch by batch: a source need not fit the memory."""
    wanted = pl.col(column).cast(pl.String).str.strip_chars().is_in(list(ids))
    for part in source.of(table):
        for frame, _ in part.read():
            rows = frame.filter(wanted)
            if rows.height:
                yield rows


def _left_out(source: SourceTables, table: str, row: pl.DataFrame) -> bool:
    """Whether the source leaves these rows out, decided by their conversation alone."""
    empty = {name: no_rows(name) for name in _IDS}
    own = {**empty, table: row}
    if table == "feedback":
        own["messages"] = pl.concat([empty["messages"], *_rows(source, "messages", "message_id", _ids(row, "message_id"))])
    talks = {one for frame in own.values() for one in _ids(frame, "conversation_id")}
    own["conversations"] = pl.concat([empty["conversations"], *_rows(source, "conversations", "conversation_id", talks)])
    left: pl.DataFrame = getattr(source.left(Tables(**own)), table)
    return left.height < row.height


def _ids(frame: pl.DataFrame, column: str) -> set[str]:
    return set(frame[column].cast(pl.String).str.strip_chars().drop_nulls())


def _nearest(store: Store, asked: str) -> list[str]:
    ids: set[str] = set()
    for table, names in (("examples", ("message_id", "conversation_id")), ("feedback", ("feedback_id",))):
        for path in part_files(store, table):
            frame = pl.read_parquet(path, columns=list(names))
            ids |= {one for name in names for one in frame[name].unique().drop_nulls()}
    best = process.extract(asked, sorted(ids), scorer=fuzz.ratio, limit=NEAREST, score_cutoff=60)
    return [one for one, _, _ in best]
