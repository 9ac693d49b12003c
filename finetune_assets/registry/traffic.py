"""Tables of what the router saw. `conversations`, `messages` and `ai_rlhf_feedback` are the users' platform's, column by column.

So the ledger's database is a source of the corpus. Everything of ours (arm, version, outcome, times, cost) is in `requests`,
which names the reply's message; shadow replies, which no user saw, are in `shadow_replies`.
"""

from __future__ import annotations

import datetime
from typing import Any

import sqlalchemy as sa

from finetune_assets.registry.tables import metadata


class AwareTime(sa.TypeDecorator[datetime.datetime]):
    """A time with its zone: `timestamptz` on Postgres, ISO 8601 text with its offset on SQLite, as the corpus reads them."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Text on SQLite, which has no times."""
        return dialect.type_descriptor(sa.String(40) if dialect.name == "sqlite" else sa.DateTime(timezone=True))

    def process_bind_param(self, value: datetime.datetime | None, dialect: sa.Dialect) -> Any:
        """An aware time, in UTC."""
        if value is None:
            return None
        aware = value.astimezone(datetime.UTC)
        return aware.isoformat() if dialect.name == "sqlite" else aware

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime.datetime | None:
        """Aware again."""
        del dialect
        return datetime.datetime.fromisoformat(value) if isinstance(value, str) else value


conversations = sa.Table(
    "conversations",
    metadata,
    sa.Column("conversation_id", sa.String(256), primary_key=True),
    sa.Column("tenant_id", sa.String(100)),
    sa.Column("user_id", sa.String(256)),
    sa.Column("vertical", sa.String(100)),
    sa.Column("channel", sa.String(100)),
    sa.Column("satisfaction_score", sa.Integer),
    sa.Column("started_at", AwareTime),
    sa.Column("ended_at", AwareTime),
)

messages = sa.Table(
    "messages",
    metadata,
    sa.Column("message_id", sa.String(256), primary_key=True),
    sa.Column("conversation_id", sa.String(256), index=True),
    sa.Column("role", sa.String(20)),
    sa.Column("content", sa.Text),
    sa.Column("intent", sa.String(100)),
    sa.Column("created_at", AwareTime),
)

feedback = sa.Table(
    "ai_rlhf_feedback",
    metadata,
    sa.Column("feedback_id", sa.String(256), primary_key=True),
    sa.Column("tenant_id", sa.String(100)),
    sa.Column("conversation_id", sa.String(256)),
    sa.Column("message_id", sa.String(256), index=True),
    sa.Column("feedback_type", sa.String(20)),
    sa.Column("rating", sa.Integer),
    sa.Column("expected_response", sa.Text),
    sa.Column("comment", sa.Text),
    sa.Column("created_at", AwareTime),
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("request_id", sa.String(80), primary_key=True),
    sa.Column("assistant", sa.String(80), nullable=False),
    sa.Column("tenant_id", sa.String(100)),
    sa.Column("user", sa.String(80)),  # pseudonym
    sa.Column("conversation_id", sa.String(256)),
    sa.Column("message_id", sa.String(256)),  # the reply's
    sa.Column("kind", sa.String(10), nullable=False),  # live, shadow
    sa.Column("rollout", sa.String(200)),  # salt of the rollout, null where there was none
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("step", sa.String(10), nullable=False),
    sa.Column("assigned_arm", sa.String(10), nullable=False),  # champion, candidate; a, b in an experiment
    sa.Column("served_arm", sa.String(10), nullable=False),  # champion after a fallback
    sa.Column("kept", sa.Boolean, nullable=False),  # of an open conversation that has its arm from an earlier step
    sa.Column("version", sa.String(80), nullable=False),  # that gave the reply
    sa.Column("outcome", sa.String(20), nullable=False),  # of the assigned arm: ok, error, timeout, policy, gone, refused
    sa.Column("status", sa.Integer, nullable=False),  # HTTP status that the client got
    sa.Column("error", sa.Text),
    sa.Column("seconds", sa.Float),
    sa.Column("first_token_seconds", sa.Float),
    sa.Column("prompt_tokens", sa.Integer),
    sa.Column("completion_tokens", sa.Integer),
    sa.Column("usd", sa.Float),
    sa.Column("user_chars", sa.Integer),
    sa.Column("reply_chars", sa.Integer),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Column("history_key", sa.String(32)),  # of the chat up to this reply: finds the conversation of a client that names none
    sa.Index("requests_of_a_history", "history_key"),
    sa.Index("requests_of_a_step", "assistant", "rollout", "step", "created_at"),
    sa.Index("requests_of_a_conversation", "conversation_id", "created_at"),
    sa.Index("requests_of_a_reply", "message_id"),
)

shadow_replies = sa.Table(
    "shadow_replies",
    metadata,
    sa.Column("request_id", sa.String(80), primary_key=True),  # of the shadow request
    sa.Column("assistant", sa.String(80), nullable=False),
    sa.Column("live_message_id", sa.String(256), nullable=False),
    sa.Column("version", sa.String(80), nullable=False),
    sa.Column("content", sa.Text),
    sa.Column("created_at", sa.DateTime, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("key_hash", sa.String(64), primary_key=True),  # sha256 of a random key
    sa.Column("tenant_id", sa.String(100), nullable=False),  # `*`: an administrator's, which also opens the dashboard
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("created_at", sa.DateTime, nullable=False),
    sa.Column("revoked_at", sa.DateTime),
)

ROUTER_TABLES = {table.name: table for table in (conversations, messages, feedback, requests, shadow_replies)}
"""What the router's journal may write to."""
