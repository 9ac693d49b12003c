"""Open conversations of one worker: their arm, and what was said; the ledger knows the rest.

Bounded: the one that was quiet longest goes first, and is read back from the ledger when it goes on.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from finetune_assets.registry import Ledger
from finetune_assets.registry.traffic import messages, requests
from finetune_assets.serving.intake import Refused

log = logging.getLogger(__name__)
MOST = 20_000
MOST_STANDING = 20
"""Conversations that are tried for somebody without a name."""
LOOK_SECONDS = 5.0
"""That a request waits for the ledger: one that hangs says nothing at all."""


async def in_time(look: Callable[..., Any], *names: str) -> Any:
    """What a look into the ledger finds, in a thread. Raises Refused (503) where it does not answer, or not in time."""
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            return await asyncio.get_running_loop().run_in_executor(None, look, *names)
    except (SQLAlchemyError, TimeoutError) as error:
        log.warning("The ledger could not be asked: %s", type(error).__name__)
        raise Refused(503, "What was said before cannot be looked up right now; try again.", {"Retry-After": "1"}) from None


@dataclass
class Talk:
    """A conversation: its owner (tenant and pseudonym), arm, rollout and step of its newest turn, whether the arm is one of an
    earlier step, last time, turns (as the client sent them), and the key of its history where no id is known of it."""

    conversation: str
    tenant: str
    user: str
    arm: str
    salt: str | None
    step: str
    kept: bool
    last: datetime.datetime
    turns: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    key: str | None = None


class Talks:
    """Conversations by id, and by what was said in them."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.known: OrderedDict[str, Talk] = OrderedDict()
        self.by_history: OrderedDict[str, str] = OrderedDict()
        self.taken: OrderedDict[str, str] = OrderedDict()

    def get(self, conversation: str) -> Talk | None:
        """One that this worker remembers."""
        found = self.known.get(conversation)
        if found is not None:
            self.known.move_to_end(conversation)
        return found

    def of_history(self, key: str) -> str | None:
        """The conversation that ended with this history, if this worker remembers it."""
        return self.by_history.get(key)

    def take(self, talk: Talk | None, key: str) -> bool:
        """Whether a conversation stands at this history, and nobody here goes on with it yet."""
        if talk is None or talk.key != key or self.taken.get(talk.conversation) == key:
            return False
        self.taken[talk.conversation] = key
        self._bound()
        return True

    def remember(self, talk: Talk) -> None:
        """Keeps a conversation."""
        self.known[talk.conversation] = talk
        self.known.move_to_end(talk.conversation)
        if talk.key is not None:
            self.by_history[talk.key] = talk.conversation
        self._bound()

    def _bound(self) -> None:
        for kept in (self.known, self.by_history, self.taken):
            while len(kept) > MOST:
                kept.popitem(last=False)

    def read_history(self, key: str) -> str | None:
        """The conversation of a history, from the ledger. Blocks."""
        query = sa.select(requests.c.conversation_id).where(requests.c.history_key == key).limit(1)
        with self.ledger.engine.connect() as connection:
            return connection.execute(query).scalar()

    def read_standing(self, key: str) -> list[str]:
        """The newest conversations that stand at a history, in any order: then two workers seldom take the same. Blocks."""
        later = requests.alias()
        went_on = (later.c.conversation_id == requests.c.conversation_id) & (later.c.created_at > requests.c.created_at)
        query = (
            sa.select(requests.c.conversation_id)
            .where((requests.c.history_key == key) & ~sa.exists().where(went_on & later.c.history_key.is_not(None)))
            .order_by(requests.c.created_at.desc())
            .limit(MOST_STANDING)
        )
        with self.ledger.engine.connect() as connection:
            found = list(connection.execute(query).scalars())
        random.shuffle(found)
        return found

    def read(self, conversation: str) -> Talk | None:
        """A conversation from the ledger, with its stored turns. Blocks."""
        mine = (requests.c.conversation_id == conversation) & (requests.c.kind == "live")
        own = requests.alias()
        stands = (
            sa.select(own.c.history_key)
            .where((own.c.conversation_id == conversation) & own.c.history_key.is_not(None))
            .order_by(own.c.created_at.desc())
            .limit(1)
        )
        newest = (
            sa.select(requests, stands.scalar_subquery().label("key")).where(mine).order_by(requests.c.created_at.desc()).limit(1)
        )
        said = (
            sa.select(messages.c.role, messages.c.content)
            .where(messages.c.conversation_id == conversation)
            .order_by(messages.c.created_at)
        )
        with self.ledger.engine.connect() as connection:
            row: Any = connection.execute(newest).mappings().first()
            if row is None:
                return None
            turns = [{"role": str(role), "content": str(content)} for role, content in connection.execute(said)]
        last = row["created_at"].replace(tzinfo=datetime.UTC)
        owner = str(row["tenant_id"]), str(row["user"])
        return Talk(conversation, *owner, row["assigned_arm"], row["rollout"], row["step"], row["kept"], last, turns, row["key"])
