"""What the source held when it was last looked at: for each row hashes of its ids and content, and its week. No text, no id.

    <home>/corpus/index/parts.json      each part's state, mapping (digest), rows, and the file with its rows
    <home>/corpus/index/<hash>.parquet  rows of a part: id, conversation, message (hashes), week, digest (of the whole row); of
                                        feedback also whether it has a text
    <home>/corpus/index/touched.json    weeks that changed rows may concern, until they are rebuilt or found equal
    <home>/corpus/index/salt            what the hashes are keyed with

`look` compares the source with it and reads only the parts that may have changed. `Snapshot.closure` names the rows that decide
about some weeks: validating those alone gives what validating everything would give. Weeks are marked as touched before the
index moves on, so a crash in between loses no change.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from filelock import FileLock

from finetune_assets.corpus.cells import no_rows
from finetune_assets.corpus.parts import TIMES, Part
from finetune_assets.corpus.schema import TABLES
from finetune_assets.corpus.sources import SourceTables, Tables, empty
from finetune_assets.corpus.spool import Spool, compact
from finetune_assets.corpus.vanished import LEAST, held, refuse_much
from finetune_assets.errors import SourceError
from finetune_assets.storage import Store, read_json, write_json, write_parquet

VERSION = f"3 polars {pl.__version__}"  # Polars promises equal hashes within one version
KEYS = {"conversations": {"id": "conversation_id"}, "messages": {"id": "message_id", "conversation": "conversation_id"}}
KEYS["feedback"] = {"id": "feedback_id", "conversation": "conversation_id", "message": "message_id"}
SPOOL_SHARE = 0.1  # of the memory setting, for rows held between reading and writing

Marks = dict[str, dict[str, int]]
"""Table to week to the generation of the index that touched it."""


@dataclass(eq=False)
class Snapshot:
    """The source as it was looked at. `rows` has, for each table, part (number), row (in the part), the hashes, week, digest."""

    source: SourceTables
    parts: list[Part]
    rows: dict[str, pl.DataFrame]
    row_bytes: float
    unknown_columns: dict[str, list[str]]
    state: str  # equal for equal rows, whatever the order and the files
    generation: int
    spool: Spool
    seed: int

    def weeks(self) -> list[str]:
        """Every week in which a row happened, sorted; without `unknown`."""
        found = pl.concat([frame["week"].unique() for frame in self.rows.values()]).drop_nulls().unique().sort()
        return [day.isoformat() for day in found]

    def groups(self, table: str, weeks: Iterable[str], memory: int) -> Iterator[list[str]]:
        """The weeks in runs for which rows of about `memory` bytes are loaded; a week is never cut. For feedback these are,
        beside its own, what it is about, and the conversations of texts."""
        c, m, f = (self.rows[name] for name in TABLES)
        counted = pl.concat([frame.select("week") for frame in (c, m, f)])
        if table == "feedback":
            talks = pl.concat([c.select(conversation="id"), m.select("conversation"), f.select("conversation")])
            texts = f.filter("text").select("conversation", "week").unique()
            counted = pl.concat([talks.join(texts, on="conversation").select("week"), *[f.select("week")] * 3])
        rows = {day.isoformat(): n for day, n in counted.group_by("week").len().iter_rows() if day is not None}
        group: list[str] = []
        held = 0.0
        for week in sorted(set(weeks)):
            size = rows.get(week, 0) * self.row_bytes
            if group and held + size > memory:
                yield group
                group, held = [], 0.0
            group.append(week)
            held += size
        if group:
            yield group

    def closure(self, table: str, weeks: Sequence[str]) -> dict[str, pl.DataFrame]:
        """The rows (part, row, digest) that decide about the weeks of `conversations` or `feedback`.

        All of the conversations concerned (for feedback: of those of which a text says something, since their texts are scrubbed
        together; of the others what is judged); rows of the weeks that may belong to none; rows elsewhere that share an id with
        one of these, and what decides whether those are valid.
        """
        c, m, f = (self.rows[name] for name in TABLES)
        days = pl.Series([date.fromisoformat(week) for week in weeks], dtype=pl.Date)
        in_c, in_m, in_f = (_in(frame["week"], days) for frame in (c, m, f))
        if table == "conversations":
            messages, judged, conversations = in_m, _in(f["id"], f["id"].clear()), in_c
            whole = c.filter(in_c)["id"]
        else:
            timeless = f["week"].is_null() & _in(f["conversation"], c.filter(in_c)["id"])  # in its conversation's week
            messages, judged, conversations = _in(m["id"], m["id"].clear()), in_f | timeless, _in(c["id"], c["id"].clear())
            texts = judged & f["text"]
            its_messages = _sharing(m["id"], self._judged, f["message"].filter(texts))
            whole = pl.concat([f["conversation"].filter(texts), m["conversation"].gather(its_messages)])
        said = _in(m["conversation"], whole)
        about = self._judged.filter(said.gather(self._judged))
        judged |= _in(f["conversation"], whole) | _in(f["message"], m["id"].gather(about))
        judged = self._with_twins("feedback", judged)
        messages = (messages | said).scatter(_sharing(m["id"], self._judged, f["message"].filter(judged)), True)
        messages = self._with_twins("messages", messages)
        concerned = pl.concat([whole, m["conversation"].filter(messages), f["conversation"].filter(judged)])
        conversations |= _in(c["id"], concerned)
        chosen = zip(TABLES, (conversations, messages, judged), strict=True)
        return {name: self.rows[name].select("part", "row", "digest").filter(mask) for name, mask in chosen}

    @cached_property
    def _judged(self) -> pl.Series:
        """Where the messages stand that feedback names."""
        return _in(self.rows["messages"]["id"], self.rows["feedback"]["message"]).arg_true()

    @cached_property
    def _twins(self) -> dict[str, pl.Series]:
        """Where rows stand whose id occurs more than once."""
        ids = {table: self.rows[table]["id"] for table in ("messages", "feedback")}
        return {table: _in(own, _repeated(own)).arg_true() for table, own in ids.items()}

    def _with_twins(self, table: str, mask: pl.Series) -> pl.Series:
        """The mask's rows, and those that share an id with one of them."""
        ids, at = self.rows[table]["id"], self._twins[table]
        return mask.clone().scatter(_sharing(ids, at, ids.gather(at.filter(mask.gather(at)))), True)

    @cached_property
    def held(self) -> pl.DataFrame:
        """See `vanished.held`."""
        return held(self.rows["conversations"], self.rows["messages"])

    def load(self, wanted: dict[str, pl.DataFrame]) -> Tables:
        """The typed rows. Raises SourceError where the source no longer holds them."""
        try:
            return self.source.left(Tables(**{table: self._loaded(table, rows) for table, rows in wanted.items()}))
        finally:
            self.source.close()

    def digests(self, frame: pl.DataFrame) -> pl.Series:
        """What the index calls `digest`, of typed rows."""
        return _digests(frame, self.seed)

    def _loaded(self, table: str, rows: pl.DataFrame) -> pl.DataFrame:
        frames = [no_rows(table)]
        for (number,), group in rows.partition_by("part", as_dict=True, maintain_order=True).items():
            part = self.parts[int(number)]
            if part.key in self.spool:
                frames += self.spool.take(part.key, group["row"].cast(pl.Int64).to_numpy())
                continue
            digests, found = group["digest"].unique(), 0
            for frame, _ in _whole(part, self.spool):
                mine = frame.filter(_digests(frame, self.seed).is_in(digests.implode()))
                found += len(mine)
                frames.append(mine if len(mine) == len(frame) else compact(mine))
            if found != len(group):
                raise SourceError(f"{part.place} changed while it was read ({found} of {len(group)} rows are there). Run again.")
        return pl.concat(frames, rechunk=True)


def _whole(part: Part, spool: Spool) -> Iterator[tuple[pl.DataFrame, list[str]]]:
    """The part's frames, kept in the spool on their way; a part that breaks off is not kept."""
    spool.start(part.key)
    try:
        for frame, unknown in part.read():
            spool.add(part.key, frame)
            yield frame, unknown
    except BaseException:
        spool.drop(part.key)
        raise


def _any_of(frame: pl.DataFrame, **column: pl.Series) -> pl.DataFrame:
    name, values = next(iter(column.items()))
    return frame.join(values.drop_nulls().unique().alias(name).to_frame(), on=name, how="semi")


def _sharing(ids: pl.Series, at: pl.Series, some: pl.Series) -> pl.Series:
    """Those of the places that hold one of some ids."""
    return at.filter(_in(ids.gather(at), some))


def _repeated(ids: pl.Series) -> pl.Series:
    """The values that occur more than once; to sort numbers takes a fifth of the time that grouping them does."""
    ordered = np.sort(ids.drop_nulls().to_numpy())
    return pl.Series(ordered[1:][ordered[1:] == ordered[:-1]], dtype=pl.UInt64)


def _in(values: pl.Series, some: pl.Series) -> pl.Series:
    return values.is_in(some.drop_nulls().unique().implode()).fill_null(False)


def _digests(frame: pl.DataFrame, seed: int) -> pl.Series:
    return frame.hash_rows(seed)


def hashed(frame: pl.DataFrame, table: str, seed: int) -> pl.DataFrame:
    """The index rows of typed rows."""
    ids = {name: frame[column].str.strip_chars().replace("", None) for name, column in KEYS[table].items()}
    hashes = {name: pl.select(pl.when(own.is_not_null()).then(own.hash(seed)).alias(name))[name] for name, own in ids.items()}
    week = frame[TIMES[table]].dt.truncate("1w").dt.date()
    rows = pl.DataFrame(
        [*(own.alias(name) for name, own in hashes.items()), week.alias("week"), _digests(frame, seed).alias("digest")]
    )
    if table != "feedback":
        return rows
    has_text = frame.select(pl.any_horizontal(pl.col("expected_response", "comment").is_not_null()).alias("text"))
    return rows.with_columns(has_text.to_series())


@cache
def _no_rows(table: str) -> pl.DataFrame:
    return hashed(no_rows(table), table, 0)


class _Folder:
    """The index on disk."""

    def __init__(self, store: Store) -> None:
        self.path = store.home / "corpus" / "index"
        self.path.mkdir(parents=True, exist_ok=True)
        salt = self.path / "salt"
        if not salt.exists():
            write_json(salt, secrets.randbits(63))
        self.seed = int(read_json(salt))
        stored = _read(self.path / "parts.json")
        self.known: dict[str, dict[str, Any]] = stored.get("parts", {}) if stored.get("version") == VERSION else {}
        self.generation = int(stored.get("generation", 0))

    def rows(self, key: str) -> pl.DataFrame:
        return pl.read_parquet(self.path / self.known[key]["file"])

    def whole(self, key: str) -> bool:
        return (self.path / self.known[key]["file"]).exists()

    def keep(self, parts: dict[str, dict[str, Any]], generation: int) -> None:
        write_json(self.path / "parts.json", {"version": VERSION, "generation": generation, "parts": parts})
        files = {str(entry["file"]) for entry in parts.values()}
        for file in self.path.glob("*.parquet"):
            if file.name not in files:
                file.unlink(missing_ok=True)

    def mark(self, weeks: Iterable[str], generation: int) -> None:
        held = marks(self.path)
        new = dict.fromkeys(weeks, generation)
        write_json(self.path / "touched.json", {table: {**held.get(table, {}), **new} for table in ("conversations", "feedback")})


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.exists() else {}
    except json.JSONDecodeError:
        return {}


def marks(folder: Path) -> Marks:
    """Touched weeks."""
    return _read(folder / "touched.json")


def known_ids(store: Store, table: str, ids: pl.Series, parts: tuple[str, ...]) -> pl.Series:
    """Which ids are those of rows in parts whose keys begin so, as the source was last looked at."""
    if not parts or not (store.home / "corpus" / "index" / "parts.json").exists():
        return pl.repeat(False, len(ids), eager=True)
    folder = _Folder(store)
    found = _known_rows(folder, [key for key in folder.known if key.startswith(parts)], table)["id"]
    return _in(ids.str.strip_chars().hash(folder.seed), found)


def unmark(store: Store, table: str, weeks: Iterable[str], generation: int) -> None:
    """Takes weeks off the touched ones that were rebuilt, or found equal, at a generation of the index."""
    folder = store.home / "corpus" / "index"
    done = set(weeks)
    with FileLock(folder / "lock"):
        held = marks(folder)
        left = {week: at for week, at in held.get(table, {}).items() if week not in done or at > generation}
        if left != held.get(table, {}):
            write_json(folder / "touched.json", {**held, table: left})


def look(store: Store, source: SourceTables, memory: int, full: bool = False) -> Snapshot:
    """Brings the index up to date with the source, once per source object; `full` trusts no state and reads everything.

    Raises SourceError, also where much of what is stored would vanish (see `vanished`), and then nothing has changed.
    """
    done: dict[Path, Snapshot] = source.snapshots
    if store.home not in done or full:
        (store.home / "corpus" / "index").mkdir(parents=True, exist_ok=True)
        with FileLock(store.home / "corpus" / "index" / "lock"):
            done[store.home] = _look(_Folder(store), store, source, (memory, full))
    return done[store.home]


def _look(folder: _Folder, store: Store, source: SourceTables, memory_full: tuple[int, bool]) -> Snapshot:
    memory, full = memory_full
    spool = Spool(int(memory * SPOOL_SHARE))
    entries: dict[str, dict[str, Any]] = {}
    new: dict[str, pl.DataFrame] = {}
    try:
        for part in source.parts:
            entries[part.key] = _entry(folder, part, spool, new, full)
    finally:
        source.close()
    rows = {table: _stacked(folder, source.parts, entries, new, table) for table in TABLES}
    for table in ("conversations", "messages"):
        if rows[table].is_empty():
            raise empty(table, source)
    generation = folder.generation
    gone = [key for key in folder.known if key not in entries]
    if new or gone:
        generation += 1
        before = {table: _known_rows(folder, [*new, *gone], table) for table in TABLES}
        after = {table: _of_table(new, entries, table) for table in TABLES}
        everything = not folder.known
        if everything or (_of_old(folder.known, source.parts) and _lost(before, rows) >= LEAST):
            refuse_much(store, source, held(rows["conversations"], rows["messages"]), folder.seed)
        touched = {*_weeks(*rows.values()), *stored_weeks(store)} if everything else _touched(before, after, rows)
        if touched:
            folder.mark(touched, generation)
        for key, frame in new.items():
            write_parquet(folder.path / entries[key]["file"], frame)
        folder.keep(entries, generation)
    elif entries != folder.known:
        folder.keep(entries, generation)
    bytes_ = sum(entry["bytes"] for entry in entries.values())
    total = max(sum(entry["rows"] for entry in entries.values()), 1)
    unknown = {table: sorted({name for part in source.of(table) for name in entries[part.key]["unknown"]}) for table in TABLES}
    state = hashlib.blake2b(digest_size=8)
    for table in TABLES:
        state.update(f"{table} {rows[table].height} {rows[table]['digest'].bitwise_xor()} {rows[table]['digest'].sum()}".encode())
    return Snapshot(source, source.parts, rows, bytes_ / total, unknown, state.hexdigest(), generation, spool, folder.seed)


def stored_weeks(store: Store) -> set[str]:
    """Weeks of conversations and feedback that are there."""
    return {*store.weeks("conversations"), *store.weeks("feedback")}


def _entry(folder: _Folder, part: Part, spool: Spool, new: dict[str, pl.DataFrame], full: bool) -> dict[str, Any]:
    """What parts.json says of a part; a part that is read and differs is added to `new`."""
    old = folder.known.get(part.key)
    if old is not None and not folder.whole(part.key):
        old = None
    same_mapping = old is not None and old.get("mapping", "") == part.mapping.digest  # indexes of before do not say
    if old is not None and same_mapping and not full and not part.always:
        if old["state"] == part.state:
            return old
        if part.digest is not None and old["digest"] == part.digest():
            return {**old, "state": part.state}
    digest = part.digest() if part.digest is not None else ""
    frames: list[pl.DataFrame] = []
    unknown: list[str] = []
    size = 0.0
    for frame, names in _whole(part, spool):
        unknown = names
        frames.append(hashed(frame, part.table, folder.seed))
        size += frame.estimated_size()
    rows = pl.concat(frames)
    if part.rows is not None and rows.height != part.rows:
        raise SourceError(f"{part.place}: {rows.height:,} of {part.rows:,} rows came; it changes while it is read. Run again.")
    name = hashlib.blake2b(f"{part.key}\n{rows['digest'].hash(1).sum()}\n{rows.height}".encode(), digest_size=12).hexdigest()
    entry = {
        "table": part.table,
        "state": part.state,
        "digest": digest,
        "mapping": part.mapping.digest,
        "rows": rows.height,
        "bytes": int(size),
        "unknown": unknown,
        "file": f"{name}.parquet",
    }
    if old is None or old["rows"] != rows.height or not folder.rows(part.key)["digest"].equals(rows["digest"]):
        new[part.key] = rows
    else:
        entry["file"] = old["file"]
    return entry


def _stacked(
    folder: _Folder, parts: Sequence[Part], entries: dict[str, dict[str, Any]], new: dict[str, pl.DataFrame], table: str
) -> pl.DataFrame:
    frames = [_no_rows(table).with_row_index("row").with_columns(pl.lit(0, pl.Int32).alias("part"))]
    for number, part in enumerate(parts):
        if part.table == table and entries[part.key]["rows"]:
            own = new[part.key] if part.key in new else folder.rows(part.key)
            frames.append(own.with_row_index("row").with_columns(pl.lit(number, pl.Int32).alias("part")))
    return pl.concat(frames)


def _known_rows(folder: _Folder, keys: Iterable[str], table: str) -> pl.DataFrame:
    own = [key for key in keys if key in folder.known and folder.known[key]["table"] == table and folder.whole(key)]
    return pl.concat([_no_rows(table), *map(folder.rows, own)])


def _of_table(new: dict[str, pl.DataFrame], entries: dict[str, dict[str, Any]], table: str) -> pl.DataFrame:
    frames = [frame for key, frame in new.items() if entries[key]["table"] == table]
    return pl.concat([_no_rows(table), *frames])


def _touched(before: dict[str, pl.DataFrame], after: dict[str, pl.DataFrame], rows: dict[str, pl.DataFrame]) -> set[str]:
    """Weeks that rows which came or went may concern: their own, their conversations', those of rows that share an id,
    and of messages whose conversation came or went."""
    changed = {table: _difference(before[table], after[table]) for table in TABLES}
    c, m, f = (pl.concat([rows[table].drop("part", "row"), changed[table]]) for table in TABLES)
    twins_m, twins_f = _any_of(m, id=changed["messages"]["id"]), _any_of(f, id=changed["feedback"]["id"])
    judged_m = _any_of(m, id=pl.concat([changed["feedback"]["message"], twins_f["message"]]))
    frames = (changed["messages"], changed["feedback"], twins_m, twins_f, judged_m)
    whole = pl.concat([changed["conversations"]["id"], *(frame["conversation"] for frame in frames)]).unique()
    said = _any_of(m, conversation=whole)
    about = _any_of(f, message=pl.concat([twins_m["id"], said["id"]]).unique())
    freed = _any_of(said, conversation=changed["conversations"]["id"])  # set aside in weeks of their own, or no longer
    concerned = [_any_of(c, id=whole), _any_of(f, conversation=whole), about, freed, twins_m, twins_f, *changed.values()]
    return _weeks(*concerned)


def _of_old(known: Iterable[str], parts: Iterable[Part]) -> bool:
    """Whether the source has a folder or database of before. Wholly other addresses are other data: they may take the place."""
    return not {Path(key).parent for key in known}.isdisjoint(Path(part.key).parent for part in parts)


def _lost(before: dict[str, pl.DataFrame], rows: dict[str, pl.DataFrame]) -> int:
    """At most so many conversations of parts that changed lost their row, or all of their messages."""
    gone: list[pl.DataFrame] = []
    for table, name in (("conversations", "id"), ("messages", "conversation")):
        now = rows[table].select(id=name)
        gone.append(before[table].select(id=name).drop_nulls().join(now, on="id", how="anti"))
    return pl.concat(gone)["id"].n_unique()


def _weeks(*frames: pl.DataFrame) -> set[str]:
    days = pl.concat([frame["week"].unique() for frame in frames]).drop_nulls().unique().to_list()
    return {day.isoformat() for day in days}


def _difference(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """Rows whose number differs, by digest."""
    counts = pl.concat([before.select("digest", n=pl.lit(-1)), after.select("digest", n=pl.lit(1))])
    uneven = counts.group_by("digest").agg(pl.col("n").sum()).filter(pl.col("n") != 0)["digest"]
    return _any_of(pl.concat([before, after]), digest=uneven)
