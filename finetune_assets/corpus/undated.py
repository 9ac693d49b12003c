"""Rows that belong to no week, since neither they nor their conversation have a usable time. All are set aside.

What was said of such a row holds as long as the row is the same, and so are those that it belongs to. A file beside the index

    <home>/corpus/index/undated/<name>.parquet   key (of a row and those that it belongs to), place (null: left out of the source)

says where each stands in `rejected/week=unknown/<table>.parquet` of exactly these bytes and this code, so only what is new is
read from the source. It holds no text and no id.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from finetune_assets.corpus.index import Snapshot
from finetune_assets.corpus.schema import CODE_VERSIONS, REJECTED, TABLES, UNKNOWN_WEEK
from finetune_assets.corpus.scrubbing import clean_ids, pseudonyms
from finetune_assets.corpus.staleness import ASSETS, part_digest
from finetune_assets.corpus.validation import set_aside
from finetune_assets.storage import Store, write_parquet

MEMBERS: dict[str, tuple[str, ...]] = {"conversations": ("conversations", "messages"), "feedback": ("feedback",)}
"""The tables of a source that a table of the corpus is made from."""
_KNOWN = {"key": pl.UInt64, "place": pl.UInt32}
_WHERE = ("part", "row", "digest")


def write_undated(store: Store, table: str, snapshot: Snapshot, key: bytes) -> pl.DataFrame:
    """Writes the rows without a week of `conversations` or `feedback` as REJECTED, and gives them."""
    path = store.corpus("rejected", UNKNOWN_WEEK) / f"{table}.parquet"
    rows = pl.concat(undated_rows(snapshot)[name] for name in MEMBERS[table])
    said = _said_before(store, table, path)
    new = rows.join(said, on="key", how="anti")
    if new.height:
        said = pl.concat([said, _judged(snapshot, new, MEMBERS[table], key)])
    found = rows.select("key").join(said, on="key", how="left").sort(*REJECTED, "key", nulls_last=True)
    rejected = found.select(*REJECTED).drop_nulls("table")
    write_parquet(path, rejected)
    known = found.with_row_index("place").with_columns(place=pl.when(pl.col("table").is_not_null()).then("place"))
    named = _named(store, table, path)
    write_parquet(named, known.select(pl.col(name).cast(dtype) for name, dtype in _KNOWN.items()).unique("key", keep="first"))
    for old in named.parent.glob(f"{table}-*.parquet"):
        if old != named:
            old.unlink(missing_ok=True)
    return rejected


def undated_rows(snapshot: Snapshot) -> dict[str, pl.DataFrame]:
    """Of each table the rows without a week: table, part, row, digest, conversation, message, key."""
    c, m, f = (snapshot.rows[name] for name in TABLES)
    dated = c.filter(c["week"].is_not_null())["id"]
    own_c = c.filter(c["week"].is_null())
    own_m, own_f = (frame.filter(frame["week"].is_null() & ~_in(frame["conversation"], dated)) for frame in (m, f))
    judged = m.filter(_in(m["id"], own_f["message"]))
    about = pl.concat([own_m["conversation"], own_f["conversation"], judged["conversation"]])
    talks = _state(c.filter(_in(c["id"], about)), "id", ["digest"], snapshot.seed)
    said = _state(_with(judged, talks, "conversation"), "id", ["digest", "conversation_state"], snapshot.seed)
    found = {
        "conversations": own_c.with_columns(conversation="id"),
        "messages": _with(own_m, talks, "conversation"),
        "feedback": _with(_with(own_f, talks, "conversation"), said, "message"),
    }
    return {name: _keyed(frame, name, snapshot.seed) for name, frame in found.items()}


def _keyed(frame: pl.DataFrame, table: str, seed: int) -> pl.DataFrame:
    states = [name for name in ("conversation_state", "message_state") if name in frame.columns]
    key = frame.select("digest", *states).hash_rows(seed).alias("key")
    message = [] if "message" in frame.columns else [pl.lit(None, pl.UInt64).alias("message")]
    return (
        frame.with_columns(*message, pl.lit(table).alias("table"))
        .select("table", *_WHERE, "conversation", "message")
        .with_columns(key)
    )


def _state(frame: pl.DataFrame, by: str, columns: list[str], seed: int) -> pl.DataFrame:
    """Of each value the sum of its rows' hashes: equal for equal rows, whatever their order."""
    rows = frame.select(by).with_columns(frame.select(columns).hash_rows(seed).alias("state"))
    return rows.drop_nulls(by).group_by(by).agg(pl.col("state").sum())


def _with(frame: pl.DataFrame, states: pl.DataFrame, column: str) -> pl.DataFrame:
    return frame.join(states.select(pl.col("id").alias(column), pl.col("state").alias(f"{column}_state")), on=column, how="left")


def _judged(snapshot: Snapshot, new: pl.DataFrame, members: tuple[str, ...], key: bytes) -> pl.DataFrame:
    """`key` and REJECTED of each new row, null where the source leaves it out; read with those that they belong to."""
    c, m = snapshot.rows["conversations"], snapshot.rows["messages"]
    own = {name: new.filter(pl.col("table") == name) for name in TABLES}
    messages = m.filter(_in(m["id"], own["feedback"]["message"]))
    talks = pl.concat([new["conversation"], messages["conversation"]])
    wanted = {
        "conversations": pl.concat([own["conversations"].select(_WHERE), c.filter(_in(c["id"], talks)).select(_WHERE)]),
        "messages": pl.concat([own["messages"].select(_WHERE), messages.select(_WHERE)]),
        "feedback": own["feedback"].select(_WHERE),
    }
    loaded = snapshot.load({name: rows.unique().sort("part", "row") for name, rows in wanted.items()})
    judged = set_aside(loaded)
    rows = pl.concat(judged[name].with_columns(snapshot.digests(getattr(loaded, name)).alias("digest")) for name in members)
    rows = rows.with_columns(
        *(clean_ids(rows[name], rows["user_id"], key).alias(name) for name in ("id", "conversation_id")),
        pseudonyms(rows["user_id"], key).alias("user"),
    )
    rows = rows.with_columns(pl.col("table").alias("_table")).unique(["_table", "digest"], keep="first")
    asked = new.select("key", "digest", _table="table").unique()
    found = asked.join(rows, on=["_table", "digest"], how="left")
    return found.select("key", *(pl.col(name).cast(dtype) for name, dtype in REJECTED.items()))


def _said_before(store: Store, table: str, path: Path) -> pl.DataFrame:
    """`key` and REJECTED of what the stored file says; nothing of one that something else has changed since."""
    nothing = pl.DataFrame(schema={"key": pl.UInt64, **REJECTED})
    if not path.exists() or not (named := _named(store, table, path)).exists():
        return nothing
    stored = pl.read_parquet(path).with_row_index("place")
    return pl.concat([nothing, pl.read_parquet(named).join(stored, on="place", how="left").drop("place")])


def _named(store: Store, table: str, path: Path) -> Path:
    name = f"{table}-{CODE_VERSIONS[ASSETS[table]]}-{part_digest(path)}.parquet"
    return store.home / "corpus" / "index" / "undated" / name


def _in(values: pl.Series, some: pl.Series) -> pl.Series:
    return values.is_in(some.drop_nulls().unique().implode()).fill_null(False)
