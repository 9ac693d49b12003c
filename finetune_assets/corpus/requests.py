"""Requests to be forgotten that arrive in a source: a table `erasure_requests` beside the three of the corpus, if it has one.

    user_id, conversation_id, requested_at      all optional; a row needs one of the ids, and a user's id counts before the other

A file or folder of files (`erasure_requests.parquet`, …) in a folder of exports, a table or view of a database; table and columns
are mapped like the others. Who asked is left out of every build from the next read on, and `finetune erase --requests` removes
what is stored of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from finetune_assets.corpus.databases import Database
from finetune_assets.corpus.erasure import conversation_subject, user_subject
from finetune_assets.corpus.mapping import SourceMapping, read_mapping
from finetune_assets.corpus.parts import Part, request_parts
from finetune_assets.corpus.sources import shown
from finetune_assets.environment import Environment
from finetune_assets.errors import SourceError


@dataclass(frozen=True)
class Requests:
    """What some sources ask for: ids as the source has them."""

    users: frozenset[str] = frozenset()
    conversations: frozenset[str] = frozenset()

    def subjects(self, key: bytes) -> frozenset[str]:
        """Keyed hashes of whom to forget."""
        users = {user_subject(user, key) for user in self.users}
        return frozenset(users | {conversation_subject(talk, key) for talk in self.conversations})


def read_requests(sources: Sequence[str], mapping: SourceMapping | None = None) -> Requests:
    """The requests of all sources. Raises SourceError for a source or table that cannot be read, one that is not there under
    the name it is said to have, and for a row that names nobody: a request that is passed over in silence would be worse."""
    mapping = read_mapping(Environment.read().source_mapping) if mapping is None else mapping
    mapping.check_used([shown(source) for source in sources])
    users, talks = set[str](), set[str]()
    for source in sources:
        own = mapping.of(shown(source))
        database = Database(source) if "://" in source else None
        try:
            for part in request_parts(database or Path(source), own):
                _add(part, users, talks)
        finally:
            if database is not None:
                database.close()
    return Requests(frozenset(users), frozenset(talks))


def _add(part: Part, users: set[str], talks: set[str]) -> None:
    for frame, unknown in part.read():
        ids = [_ids(frame[name]) for name in ("user_id", "conversation_id")]
        for row, (user, talk) in enumerate(zip(*ids, strict=True), start=1):
            if user:
                users.add(user)
            elif talk:
                talks.add(talk)
            else:
                unread = f" (columns that are not read: {', '.join(unknown)})" if unknown else ""
                raise SourceError(
                    f"{part.place}: row {row} names neither a user_id nor a conversation_id, so nobody can be forgotten for it"
                    f"{unread}. Complete or delete the row; other names of columns can be mapped (FINETUNE_SOURCE_MAPPING)."
                )


def _ids(values: pl.Series) -> Iterable[str | None]:
    return values.cast(pl.String).str.strip_chars().to_list()
