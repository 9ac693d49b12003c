"""What users were answered beside what the candidate would have said: chats of a shadow step, for people to compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from finetune_assets.registry.ledger import Ledger
from finetune_assets.registry.traffic import messages, requests, shadow_replies


@dataclass(frozen=True)
class Shadowed:
    """One live reply, the shadow's, and the turns before them; texts as the router stored them."""

    message_id: str
    conversation_id: str
    tenant_id: str
    context: list[dict[str, str]]
    live: str
    shadow: str


def shadowed(ledger: Ledger, assistant: str, version: str | None = None) -> tuple[str | None, list[Shadowed]]:
    """The version (default: the one that answered unseen last) and its chats, oldest first; null where there are none."""
    mine = shadow_replies.c.assistant == assistant
    newest = sa.select(shadow_replies.c.version).where(mine).order_by(shadow_replies.c.created_at.desc()).limit(1)
    pairs = (
        sa.select(
            messages.c.message_id,
            messages.c.conversation_id,
            messages.c.content.label("live"),
            messages.c.created_at,
            shadow_replies.c.content.label("shadow"),
            requests.c.tenant_id,
        )
        .select_from(
            shadow_replies.join(messages, messages.c.message_id == shadow_replies.c.live_message_id).join(
                requests, requests.c.request_id == shadow_replies.c.request_id
            )
        )
        .where(mine)
        .order_by(messages.c.created_at, messages.c.message_id)
    )
    with ledger.engine.connect() as connection:
        version = version or connection.execute(newest).scalar()
        rows = connection.execute(pairs.where(shadow_replies.c.version == version)).all()
        said = (
            sa.select(messages.c.conversation_id, messages.c.role, messages.c.content, messages.c.created_at)
            .where(messages.c.conversation_id.in_({row.conversation_id for row in rows}))
            .order_by(messages.c.created_at)
        )
        turns: dict[str, list[Any]] = {}
        for turn in connection.execute(said):
            turns.setdefault(turn.conversation_id, []).append(turn)
    made = [
        Shadowed(
            row.message_id,
            row.conversation_id,
            row.tenant_id or assistant,
            [
                {"role": turn.role, "content": turn.content}
                for turn in turns[row.conversation_id]
                if turn.created_at < row.created_at
            ],
            row.live,
            row.shadow,
        )
        for row in rows
    ]
    return version, made
