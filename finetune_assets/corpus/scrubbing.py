"""Takes personal data out of validated rows: texts a conversation at a time, ids one by one, users by keyed hash.

A conversation's messages, intents, corrections and comments are scrubbed together, in one fixed order, whichever week is being
written: so a value has the same placeholder in all of them. Only conversations in which a cheap pattern sees something pass
through Python.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import polars as pl

from finetune_assets.corpus import presidio
from finetune_assets.corpus.personal_data import (
    DEFAULT_REGIONS,
    KINDS,
    may_ask,
    may_hold,
    plain_ids,
    pseudonym,
    scrub_conversation,
    scrub_id,
)

BUCKETS = 10_000
_SALT = b"finetune_assets/bucket/1:"  # never changes: a new salt would move people between train and test
PLACEHOLDER = rf"\[({'|'.join(kind.upper() for kind in KINDS)})(?:_\d+)?\]"
_PLACEHOLDER = re.compile(PLACEHOLDER)
MIN_USER_ID = 6  # characters from which a user id inside another id is taken for the user's
TEXTS = {"messages": ("content", "intent"), "feedback": ("expected_response", "comment")}


@dataclass(frozen=True)
class Scrubbed:
    """Messages and feedback with their texts scrubbed; `found` counts what was replaced: table, week, kind, rows."""

    messages: pl.DataFrame
    feedback: pl.DataFrame
    found: pl.DataFrame


Allowed = Mapping[str, frozenset[str]]
NOBODY: Allowed = MappingProxyType({})
Regions = Mapping[str, tuple[str, ...]]
"""`tenant NAME` or `vertical NAME` to the countries whose national phone numbers are looked for. The tenant's own counts first;
who has none has DEFAULT_REGIONS."""
USUAL: Regions = MappingProxyType({})


def regions_of(regions: Regions, tenant: str, vertical: str) -> tuple[str, ...]:
    """The countries of a tenant of a vertical."""
    return regions.get(f"tenant {tenant}") or regions.get(f"vertical {vertical}") or DEFAULT_REGIONS


def own_digest(contacts: Allowed, regions: Regions, tenants: Mapping[str, str] | None = None) -> str:
    """Tells apart what some tenants (with their verticals; none: all) have set for scrubbing; empty where nothing is set."""
    wanted = sorted(contacts if tenants is None else set(tenants) & set(contacts))
    lines = [f"{tenant}\t{contact}" for tenant in wanted for contact in sorted(contacts[tenant])]
    whose = sorted(regions if tenants is None else {k for t, v in tenants.items() for k in (f"tenant {t}", f"vertical {v}")})
    lines += [f"{one}\t{' '.join(sorted(regions[one]))}" for one in whose if one in regions]
    lines += [f"presidio\t{name}" for name in presidio.configured()]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest() if lines else ""


def allowed_in(conversations: pl.DataFrame, contacts: Allowed) -> Allowed:
    """Conversation id to what stays in its texts: the contacts of its own tenant."""
    if not contacts:
        return NOBODY
    own = conversations.filter(pl.col("tenant_id").is_in(sorted(contacts))).select("conversation_id", "tenant_id")
    return {talk: contacts[tenant] for talk, tenant in own.iter_rows()}


def regions_in(conversations: pl.DataFrame, regions: Regions) -> Regions:
    """Conversation id to the countries of its tenant, where those are not the default."""
    if not regions:
        return USUAL
    rows = conversations.select("conversation_id", "tenant_id", "vertical").iter_rows()
    own = ((talk, regions_of(regions, tenant, vertical)) for talk, tenant, vertical in rows)
    return {talk: countries for talk, countries in own if countries is not DEFAULT_REGIONS}


def scrub_texts(messages: pl.DataFrame, feedback: pl.DataFrame, allowed: Allowed = NOBODY, regions: Regions = USUAL) -> Scrubbed:
    """Scrubs all texts of some conversations: their messages in turn order, their feedback in time order, of whatever weeks.
    `allowed`: conversation id to values that stay; `regions`: to the countries of its national phone numbers.

    Both frames have conversation_id and week; a conversation must be whole, or its placeholders may differ from another call's.
    """
    texts = long_texts(messages, feedback)
    texts = texts.with_columns(may_hold(texts["text"]).alias("holds"), may_ask(texts["text"]).alias("asks"))
    watched = texts.filter(pl.col("holds") | pl.col("asks"))["conversation_id"].unique()
    changed, found = _scrub(texts.filter(pl.col("conversation_id").is_in(watched.implode())), allowed, regions)
    return Scrubbed(_replaced("messages", messages, changed), _replaced("feedback", feedback, changed), found)


def long_texts(messages: pl.DataFrame, feedback: pl.DataFrame) -> pl.DataFrame:
    """One row a text, in the order in which a conversation is scrubbed: table, column, row (number in its frame), week,
    conversation_id, text."""
    return pl.concat([_long("messages", messages), _long("feedback", feedback)])


def _long(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    numbered = frame.with_row_index("row")
    return pl.concat(
        numbered.select(
            pl.lit(table).alias("table"),
            pl.lit(column).alias("column"),
            "row",
            "week",
            "conversation_id",
            pl.col(column).alias("text"),
        ).filter(pl.col("text").is_not_null())
        for column in TEXTS[table]
    )


def _scrub(texts: pl.DataFrame, allowed: Allowed, regions: Regions) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The texts that change (table, column, row, text), and how many values were replaced (table, week, kind, rows)."""
    talks = texts.with_row_index("_at").group_by("conversation_id", maintain_order=True).agg("_at")
    texts = texts[talks["_at"].explode()]  # a conversation's stand together, in their order
    said, holds, asks = (texts[name].to_list() for name in ("text", "holds", "asks"))
    places, after = list[int](), list[str]()
    counted, kinds = list[int](), list[str]()
    start = 0
    for talk, size in talks.select("conversation_id", pl.col("_at").list.len()).iter_rows():
        own, start = slice(start, start + size), start + size
        where, own_contacts = regions.get(talk, DEFAULT_REGIONS), allowed.get(talk, frozenset())
        scrubbed, _ = scrub_conversation(said[own], regions=where, allow=own_contacts, looked=(holds[own], asks[own]))
        for place, new in enumerate(scrubbed, start=own.start):
            if new != said[place]:
                places.append(place)
                after.append(new)
                added = _added(said[place], new)
                counted += [place] * len(added)
                kinds += added
    changed = texts[places].select("table", "column", "row", pl.Series("text", after, dtype=pl.String))
    found = texts[counted].select("table", "week", pl.Series("kind", kinds, dtype=pl.String))
    return changed, found.group_by("table", "week", "kind").len("rows")


def _added(old: str, new: str) -> list[str]:
    """The kinds of the placeholders that a text did not have before."""
    kinds = _kinds(new)
    for kind in _kinds(old):
        if kind in kinds:
            kinds.remove(kind)
    return kinds


def _kinds(text: str) -> list[str]:
    return [match[1].lower() for match in _PLACEHOLDER.finditer(text)] if "[" in text else []


def _replaced(table: str, frame: pl.DataFrame, changed: pl.DataFrame) -> pl.DataFrame:
    for column in TEXTS[table]:
        new = changed.filter((pl.col("table") == table) & (pl.col("column") == column))
        if not new.is_empty():
            frame = frame.with_columns(frame[column].clone().scatter(new["row"], new["text"]))
    return frame


def clean_ids(ids: pl.Series, users: pl.Series, key: bytes) -> pl.Series:
    """Ids in which a recogniser finds something, or which hold their (raw) user's id, as keyed hashes; the others as they are."""
    frame = pl.DataFrame({"id": ids.alias("id"), "user": users.alias("user")})
    holds = (pl.col("user").str.len_chars() >= MIN_USER_ID) & pl.col("id").str.contains(pl.col("user"), literal=True)
    inside = frame.select(holds.fill_null(False).alias("inside"))["inside"]
    doubtful = inside | ~plain_ids(ids).fill_null(True)
    if not doubtful.any():
        return ids
    values, own = ids.filter(doubtful).to_list(), inside.filter(doubtful).to_list()
    hashed = {value: _hashed(value, held, key) for value, held in sorted(set(zip(values, own, strict=True)))}
    changed = {value: clean for value, clean in hashed.items() if clean != value}
    return ids.replace(list(changed), list(changed.values())) if changed else ids


def _hashed(value: str, holds_user: bool, key: bytes) -> str:
    return "p_" + pseudonym(value, key).removeprefix("u_") if holds_user else scrub_id(value, key)


def clean_labels(labels: pl.Series, key: bytes) -> pl.Series:
    """Tenants, verticals and channels: few distinct values, each treated as an id."""
    distinct = labels.unique().drop_nulls().to_list()
    changed = {label: clean for label in distinct if (clean := scrub_id(label, key)) != label}
    return labels.replace(list(changed), list(changed.values())) if changed else labels


def pseudonyms(users: pl.Series, key: bytes) -> pl.Series:
    """The keyed hash of each user; null stays null."""
    return _mapped(users, ((user, pseudonym(user, key)) for user in users.unique().drop_nulls()), pl.String)


def buckets(users: pl.Series, conversation_ids: pl.Series) -> pl.Series:
    """0..9999 from the raw user id, or the raw conversation id where there is no user: what splits go by."""
    source = users.fill_null("").zip_with(users.is_not_null(), conversation_ids)
    return _mapped(source, ((value, _bucket(value)) for value in source.unique()), pl.UInt16)


def _bucket(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(_SALT + value.encode(), digest_size=8).digest(), "big") % BUCKETS


def _mapped(values: pl.Series, pairs: Iterable[tuple[str, str | int]], dtype: type[pl.DataType]) -> pl.Series:
    table = dict(pairs)
    return (
        values.replace_strict(list(table), list(table.values()), default=None, return_dtype=dtype)
        if table
        else values.cast(dtype)
    )
