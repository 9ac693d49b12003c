"""`finetune explain`: what became of one message, conversation or feedback row, and why, from the store's own files.

`explain` answers with plain values; `cli/data.py` shows them. Nothing is written. The source is asked only about what the store
does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rapidfuzz import fuzz, process

from finetune_assets.corpus.erasure import Erased, conversation_subject, hashed_id
from finetune_assets.corpus.examples import ERROR_REPLIES
from finetune_assets.corpus.near_duplicates import normalise
from finetune_assets.corpus.personal_data import KINDS, find, keyed
from finetune_assets.corpus.sources import SourceTables
from finetune_assets.dataset.formats import FILES
from finetune_assets.dataset.manifest import latest, read_manifest
from finetune_assets.errors import FinetuneError
from finetune_assets.registry import Ledger, erasures
from finetune_assets.storage import Store

NEAREST = 3
LONGEST = 240  # characters of a text that is shown
Facts = dict[str, Any]
_IDS = {"message": "message_id", "conversation": "conversation_id", "feedback": "feedback_id"}


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


def _parts(store: Store, table: str) -> list[Path]:
    return [path for week in store.weeks(table) for path in sorted(store.corpus(table, week).glob("*.parquet"))]


def _rows(store: Store, table: str, column: str, ids: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Week and row of each row of a corpus table with one of the ids."""
    for path in _parts(store, table):
        if column not in pl.read_parquet_schema(path):
            continue
        hits = pl.read_parquet(path, columns=[column])[column].is_in(ids).fill_null(False)
        if hits.any():
            for row in pl.read_parquet(path).filter(hits).iter_rows(named=True):
                yield path.parent.name.removeprefix("week="), row


def _message(store: Store, asked: Asked) -> Facts | None:
    """Examples are looked through first: only a message that is none makes it read the conversations."""
    for week, example in _rows(store, "examples", "message_id", asked.ids):
        talk = next((row for _, row in _rows(store, "conversations", "conversation_id", [example["conversation_id"]])), None)
        return _of_message(store, asked, week, talk, example)
    for path in _parts(store, "conversations"):
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
    judged = _judgements(store, own)
    facts: Facts = {
        "week": week,
        "message_id": own,
        "conversation_id": (talk or example or {})["conversation_id"],
        "tenant_id": (talk or example or {})["tenant_id"],
        "vertical": (talk or example or {})["vertical"],
        "role": message["role"] if message else "assistant",
        "said_at": str(message["created_at"] if message else (example or {})["created_at"]),
        "text": _clip(text),
        "scrubbed": sorted({kind for kind in KINDS if re.search(rf"\[{kind.upper()}(?:_\d+)?\]", text)}),
        "repaired": _rejected(store, [own]),
        "feedback": judged,
        "example": example is not None,
    }
    if example is None:
        facts["why"] = _no_example(facts["role"], own, turns)
        return facts
    facts |= {name: example[name] for name in ("intent", "satisfaction_score", "training_consent", "user_chars", "reply_chars")}
    facts["asked"] = _clip(str(example["user_text"]))
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


def _judgements(store: Store, message_id: str) -> list[Facts]:
    names = ("feedback_id", "feedback_type", "rating", "expected_response")
    rows = list(_rows(store, "feedback", "message_id", [message_id]))
    return [{"week": week, "at": str(row["created_at"]), **{name: row[name] for name in names}} for week, row in rows]


def _conversation(store: Store, asked: Asked) -> Facts | None:
    for week, talk in _rows(store, "conversations", "conversation_id", asked.ids):
        own = str(talk["conversation_id"])
        examples = {row["message_id"]: row for _, row in _rows(store, "examples", "conversation_id", [own])}
        messages: list[Facts] = []
        for turn in talk["messages"]:
            example = examples.get(turn["message_id"])
            judged = _judgements(store, turn["message_id"]) if example else []
            fates = [fate(store, name, example, judged) for name in _assistants(store, asked)] if example else []
            why = None if example else _no_example(turn["role"], turn["message_id"], talk["messages"])
            shown = {"message_id": turn["message_id"], "role": turn["role"], "text": _clip(turn["content"])}
            messages.append({**shown, "why": why, "assistants": fates})
        names = ("conversation_id", "tenant_id", "vertical", "satisfaction_score", "training_consent")
        return {"week": week, **{name: talk[name] for name in names}, "messages": messages, "rejected": _rejected(store, [own])}
    return None


def _feedback(store: Store, asked: Asked) -> Facts | None:
    for week, row in _rows(store, "feedback", "feedback_id", asked.ids):
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


# --- what an assistant's data set says


def _assistants(store: Store, asked: Asked) -> list[str]:
    there = sorted(path.parent.name for path in (store.home / "datasets").glob("*/latest"))
    return list(asked.assistants) or there


def fate(store: Store, assistant: str, example: Facts, judged: list[Facts]) -> Facts:
    """What an assistant's newest data set made of an example: kept where, or dropped why.

    `state`: kept, dropped, not_selected, not_read (the data set is older than the week), no_data_set.
    """
    folder = latest(store, assistant)
    if folder is None:
        return {"assistant": assistant, "state": "no_data_set", "why": f"{assistant} has no data set; run its jsonl_splits."}
    manifest = read_manifest(folder)
    own = str(example["message_id"])
    base: Facts = {"assistant": assistant, "fingerprint": folder.name, **_pairs(folder, own)}
    lineage = pl.read_parquet(folder / "lineage.parquet").filter(pl.col("message_id") == own)
    varied = lineage.filter(pl.col("source") == "synthetic").height
    lineage = lineage.filter(pl.col("source") != "synthetic")  # those carry the id of the message that they vary
    if varied:
        base["varied"] = varied
    if lineage.height:
        row = lineage.row(0, named=True)
        place = f"{row['split']}.jsonl:{row['line'] + 1}"
        return {**base, "state": "kept", **_kept(row), "place": place, "why": f"{place}, as {_source(row, example, judged)}"}
    dropped = pl.read_parquet(folder / "dropped.parquet").filter(pl.col("message_id") == own)
    if dropped.height:
        row = dropped.row(0, named=True)
        return {**base, "state": "dropped", **row, **_why(store, row, example, judged, manifest["settings"])}
    select = {name: value for name, value in manifest["settings"]["select"].items() if value}
    if any(example["tenant_id" if name == "tenant" else name] != value for name, value in select.items()):
        wanted = ", ".join(f"{name}: {value}" for name, value in select.items())
        return {**base, "state": "not_selected", "why": f"{assistant} selects {{{wanted}}}, this is of {example['tenant_id']}."}
    made = str(manifest["created_at"])[:16]
    return {**base, "state": "not_read", "why": f"The data set of {made} did not read this message's week; make it again."}


def _kept(row: Facts) -> Facts:
    return {name: row[name] for name in ("split", "line", "source", "replaced")}


def _source(row: Facts, example: Facts, judged: list[Facts]) -> str:
    told = {
        "corrected": "a correction: the target is the expected_response of the feedback",
        "positive": "a praised reply",
        "satisfied": f"a reply of a conversation with satisfaction_score {example['satisfaction_score']}",
    }.get(row["source"], f"a row of source {row['source']}")
    ids = ", ".join(one["feedback_id"] for one in judged if row["source"] in ("corrected", "positive"))
    twins = f"; it stands for {len(row['replaced'])} twin(s)" if row["replaced"] else ""
    return f"{told}{f' ({ids})' if ids else ''}{twins}"


def _pairs(folder: Path, message_id: str) -> Facts:
    """Where preference pairs and labels of this message stand."""
    found: dict[str, list[str]] = {}
    for spec in FILES:
        if spec.kind == "examples":
            continue
        rows = pl.read_parquet(folder / spec.lineage).filter(
            (pl.col("message_id") == message_id) & pl.col("split").is_in(spec.splits)
        )
        found.setdefault(spec.kind, []).extend(f"{spec.name}:{line + 1}" for line in rows["line"])
    return {kind: places for kind, places in found.items() if places}


def _why(store: Store, row: Facts, example: Facts, judged: list[Facts], settings: Facts) -> Facts:
    """The rule in words, with the values that decided; for a twin the one that was kept."""
    filters: Facts = settings["filters"]
    expected = next((one["expected_response"] for one in reversed(judged) if one["expected_response"]), None)
    reply = str(expected or example["reply"])
    sizes = {"reply": (len(reply), filters["reply_chars"]), "user": (example["user_chars"], filters["user_chars"])}
    reason = str(row["reason"])
    target, _, side = reason.partition("_too_")
    if side and target in sizes:
        chars, bounds = sizes[target]
        return {"why": f"the {target}'s text has {chars} characters, filters.{target}_chars allows {bounds[0]} to {bounds[1]}"}
    if reason in ("same_as_negative", "exact_duplicate", "near_duplicate"):
        return _twin(store, reason, row, example, reply, filters)
    bad = ", ".join(f"{one['feedback_id']} on {one['at'][:10]}" for one in judged if one["feedback_type"] == "negative")
    score = example["satisfaction_score"]
    asked = filters["require"].get(example["intent"])
    told = {
        "tenant_excluded": f"tenant {example['tenant_id']} is in filters.exclude_tenants",
        "no_consent": "the conversation's training_consent is false",
        "negative_feedback": f"rated negative ({bad}) and not corrected: never a target",
        "not_satisfied": f"satisfaction_score is {'missing' if score is None else score}, filters.min_satisfaction is "
        f"{filters['min_satisfaction']}, and nobody praised or corrected it",
        "reply_empty": "the reply has no visible character",
        "error_reply": f"the reply says {_first_match(reply, [p for ps in ERROR_REPLIES.values() for p in ps])!r}",
        "excluded_pattern": f"the reply says {_first_match(reply, filters['exclude'] or [])!r}, which filters.exclude forbids",
        "required_pattern_missing": f"intent {example['intent']} asks for {asked!r} (filters.require), neither turn has it",
        "user_in_test": "split.mode is time, and its user also stands in the test set",
        "personal_data_residual": f"a recogniser still finds {', '.join(sorted({f.kind for f in _left(example, reply)}))}",
        "intent_cap": f"intent {example['intent']} has more training rows than balance.max_per_intent",
        "tenant_cap": f"tenant {example['tenant_id']} has more training rows than balance.max_per_tenant",
        "negative_share": "more requests to decline or hand over than balance.negative_share",
    }
    return {"why": told.get(reason, f"rule {reason}; docs/data.md lists the rules")}


def _left(example: Facts, reply: str) -> list[Any]:
    return [f for text in (*(turn["content"] for turn in example["context"]), reply) for f in find(str(text))]


def _first_match(text: str, patterns: list[str]) -> str | None:
    matches = (re.search(pattern, text, re.IGNORECASE) for pattern in patterns)
    return next((m[0] for m in matches if m), None)


def _twin(store: Store, reason: str, row: Facts, example: Facts, reply: str, filters: Facts) -> Facts:
    other = next((one for _, one in _rows(store, "examples", "message_id", [row["kept_message_id"]])), None)
    if other is None:
        return {"why": f"the same, or nearly, as {row['kept_message_id'] or 'a message that was erased since'}"}
    judged = _judgements(store, str(other["message_id"]))
    expected = next((one["expected_response"] for one in reversed(judged) if one["expected_response"]), None)
    theirs = str(other["reply"] if reason == "same_as_negative" else expected or other["reply"])
    mine, twin = normalise(
        pl.Series([f"{example['user_text']}\n{reply}", f"{other['user_text']}\n{theirs}"], dtype=pl.String)
    ).to_list()
    alike = round(fuzz.ratio(mine, twin) / 100, 3)
    said = "the same as one that was rated badly" if reason == "same_as_negative" else "a better twin was kept"
    return {
        "why": f"{said}: {row['kept_message_id']}, similarity {alike:g}, filters.near_duplicate is {filters['near_duplicate']:g}",
        "similarity": alike,
        "kept_text": _clip(f"{other['user_text']} → {theirs}"),
    }


# --- what is not in the corpus


def _absent(store: Store, ledger: Ledger, asked: Asked, source: Callable[[], SourceTables]) -> Facts:
    known = erasures.all_erasures(ledger)
    hashed = {hashed_id(one, asked.key) for one in asked.ids}
    subject = conversation_subject(asked.id, asked.key)
    for one in known:
        if hashed & one.messages or one.subject == subject:
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
    where = _in_source(tables, asked.id)
    if where is None:
        return {"kind": "unknown", "looked": looked, "nearest": _nearest(store, asked.id)}
    left = Erased(frozenset(one.subject for one in known), asked.key).leave_out(tables)
    if _in_source(left, asked.id) is None:
        return {"kind": "erased", "at": "", "why": "the source still holds it, but its person was erased: no build reads it"}
    return {
        "kind": "unread",
        "why": f"{where} in the source, not read yet: materialise its week (finetune run does)",
        "looked": looked,
    }


def _in_source(tables: SourceTables, asked: str) -> str | None:
    """What the source holds under an id, and of when."""
    for kind, column in _IDS.items():
        frame: pl.DataFrame = {"message": tables.messages, "conversation": tables.conversations}.get(kind, tables.feedback)
        rows = frame.filter(pl.col(column).cast(pl.String).str.strip_chars() == asked)
        if rows.height:
            return f"a {kind} of {rows['started_at' if kind == 'conversation' else 'created_at'][0]}"
    return None


def _nearest(store: Store, asked: str) -> list[str]:
    ids: set[str] = set()
    for table, names in (("examples", ("message_id", "conversation_id")), ("feedback", ("feedback_id",))):
        for path in _parts(store, table):
            frame = pl.read_parquet(path, columns=list(names))
            ids |= {one for name in names for one in frame[name].unique().drop_nulls()}
    best = process.extract(asked, sorted(ids), scorer=fuzz.ratio, limit=NEAREST, score_cutoff=60)
    return [one for one, _, _ in best]


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
