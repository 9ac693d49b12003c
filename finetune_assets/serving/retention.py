"""Rows of the router that are older than an assistant keeps them: conversations as a whole, and what is known of each request.

A conversation goes with its messages, feedback, requests and shadow replies when the last of them is older than the limit. Only
conversations that the router answered for this assistant are looked at, so what the platform wrote into the same tables stays.
Requests of which no conversation is stored go by their own time. What an open rollout or experiment is judged by stays until it
has ended. Rows go in small transactions, conversations before the requests that name them, so a killed process is gone on with.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path

import sqlalchemy as sa

from finetune_assets.assistants import assistant_names, load_assistant
from finetune_assets.registry import Ledger
from finetune_assets.registry.tables import now, rollouts
from finetune_assets.registry.traffic import conversations, feedback, messages, requests, shadow_replies

BATCH = 500
"""Conversations or requests of one transaction: the router and a rollback wait for milliseconds."""


def stated(ledger: Ledger, folder: Path, tenants: Mapping[str, str]) -> dict[str, int]:
    """`serving.keep_days` of every assistant that says it: of those with a file in `folder` and of those that were ever served.

    Raises SettingsError for a file that makes no sense, before anything is removed.
    """
    names = sorted({*assistant_names(folder), *(state.assistant for state in ledger.rollouts())})
    kept = {name: load_assistant(folder, name, tenants).serving.keep_days for name in names}
    return {name: days for name, days in kept.items() if days is not None}


def expire(ledger: Ledger, assistant: str, days: int, *, apply: bool) -> dict[str, int]:
    """Rows by table that are older than so many days; removed where `apply`."""
    limit = now() - datetime.timedelta(days=days)
    open_now = _open(ledger, assistant)
    gone = {table.name: 0 for table in (conversations, messages, feedback, requests, shadow_replies)}
    old = _conversations(assistant, limit, open_now)
    for ids in _batches(ledger, old, apply):
        for table in (feedback, messages, conversations):
            gone[table.name] += _take(ledger, table, table.c.conversation_id.in_(ids), apply)
    alone = ~sa.exists().where(conversations.c.conversation_id == requests.c.conversation_id)
    free = (requests.c.assistant == assistant) & (requests.c.created_at < limit) & _over(open_now)
    free &= alone | requests.c.conversation_id.in_(old)  # once those are gone, only the first
    for ids in _batches(ledger, sa.select(requests.c.request_id).where(free).order_by(requests.c.request_id), apply):
        for table in (shadow_replies, requests):
            gone[table.name] += _take(ledger, table, table.c.request_id.in_(ids), apply)
    return gone


def _open(ledger: Ledger, assistant: str) -> list[str]:
    """Salts of the rollout and of the experiment that run."""
    query = sa.select(rollouts.c.salt, rollouts.c.experiment).where(rollouts.c.assistant == assistant)
    with ledger.engine.connect() as connection:
        row = connection.execute(query).first()
    return [salt for salt in (row.salt, (row.experiment or {}).get("salt")) if salt] if row else []


def _over(open_now: list[str]) -> sa.ColumnElement[bool]:
    return requests.c.rollout.is_(None) | requests.c.rollout.not_in(open_now)


def _conversations(assistant: str, limit: datetime.datetime, open_now: list[str]) -> sa.Select[str]:
    aware = limit.replace(tzinfo=datetime.UTC)
    younger = (
        sa.select(table.c.conversation_id).where((table.c.created_at >= aware) & table.c.conversation_id.is_not(None))
        for table in (messages, feedback)
    )
    needed = sa.func.max(sa.case((_over(open_now), 0), else_=1)) == 0
    return (
        sa.select(requests.c.conversation_id)
        .join(conversations, conversations.c.conversation_id == requests.c.conversation_id)
        .where((requests.c.assistant == assistant) & (requests.c.kind == "live"))
        .where(*(requests.c.conversation_id.not_in(some) for some in younger))
        .group_by(requests.c.conversation_id)
        .having((sa.func.max(requests.c.created_at) < limit) & needed)
        .order_by(requests.c.conversation_id)
    )


def _batches(ledger: Ledger, query: sa.Select[str], apply: bool) -> Iterator[list[str]]:
    """Ids of a query, BATCH at a time; what was taken is not found again, so the first ones are read until there are none."""
    place = 0
    while True:
        with ledger.engine.connect() as connection:
            ids = list(connection.execute(query.offset(place).limit(BATCH)).scalars())
        if not ids:
            return
        yield ids
        place += 0 if apply else len(ids)


def _take(ledger: Ledger, table: sa.Table, where: sa.ColumnElement[bool], apply: bool) -> int:
    with ledger.engine.begin() as connection:
        if apply:
            return connection.execute(sa.delete(table).where(where)).rowcount
        return int(connection.execute(sa.select(sa.func.count()).select_from(table).where(where)).scalar_one())
