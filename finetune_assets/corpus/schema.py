"""The tables of the corpus: what a source gives, what is stored, and in which types.

source                        stored under <home>/corpus
conversations, messages   ->  conversations   one row a conversation, its messages nested
feedback                  ->  feedback        one row a judgement
                              examples        one row an assistant message that has a user turn before it
                              rejected        one row for each row set aside or repaired
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import polars as pl

CODE_VERSIONS: dict[str, str] = {
    "raw_conversations": "3",
    "rlhf_feedback": "3",
    "clean_examples": "1",
}
"""Version of the rules of each asset: raise it whenever a rule changes what the asset writes, and every stored week is stale."""

TABLES: tuple[str, ...] = ("conversations", "messages", "feedback")
REQUESTS = "erasure_requests"
"""Table of a source with requests to be forgotten; see `requests`."""
FILE_NAMES: dict[str, tuple[str, ...]] = {
    "conversations": ("conversations",),
    "messages": ("messages",),
    "feedback": ("feedback", "ai_rlhf_feedback"),
    REQUESTS: (REQUESTS,),
}
"""Names a table may have in a source, as a file (without suffix), a folder or a database table."""

ROLES: tuple[str, ...] = ("user", "assistant")
"""Of a stored message; a source's rows of the role `tool` become texts of the user, see `tool_rows`."""
KINDS: tuple[str, ...] = ("conversation", "imported")
"""Of a conversation: one that an assistant had with a person, or a row of a file, which needs no satisfaction score."""
FEEDBACK_TYPES: tuple[str, ...] = ("positive", "negative")
UNKNOWN_WEEK = "unknown"
MAX_ID = 256  # characters; longer ids are no ids
SIMULATED = "simulated"  # channel of `finetune simulate`, whose people and judgements are made up
MAX_LABEL = 100  # characters of an intent or a channel


@dataclass(frozen=True)
class Column:
    """A declared column of a source: how its cells are read, and whether a file without it is refused."""

    kind: Literal["text", "time", "score", "flag", "aside"]  # aside: becomes part of another column, see `tool_rows`
    required: bool = True


_TEXT, _TIME, _SCORE = Column("text"), Column("time"), Column("score")

SOURCE: dict[str, dict[str, Column]] = {
    "conversations": {
        "conversation_id": _TEXT,
        "tenant_id": _TEXT,
        "user_id": _TEXT,
        "vertical": _TEXT,
        "channel": _TEXT,
        "satisfaction_score": _SCORE,
        "started_at": _TIME,
        "ended_at": _TIME,
        "training_consent": Column("flag", required=False),
        "kind": Column("text", required=False),  # one of KINDS; null: conversation
    },
    "messages": {
        "message_id": _TEXT,
        "conversation_id": _TEXT,
        "role": _TEXT,
        "content": _TEXT,
        "intent": _TEXT,
        "created_at": _TIME,
        "tool_calls": Column("aside", required=False),  # JSON, of an assistant's message
        "tool_name": Column("aside", required=False),  # of a message of the role `tool`
        "problem": Column("text", required=False),  # `reason: detail` of a row that could not be read; see `imports`
    },
    "feedback": {
        "feedback_id": _TEXT,
        "tenant_id": _TEXT,
        "conversation_id": _TEXT,
        "message_id": _TEXT,
        "feedback_type": _TEXT,
        "rating": _SCORE,
        "expected_response": _TEXT,
        "comment": _TEXT,
        "created_at": _TIME,
    },
    REQUESTS: {name: Column("text", required=False) for name in ("user_id", "conversation_id", "requested_at")},
}

TIME = pl.Datetime("us", "UTC")
MESSAGE = pl.Struct({"message_id": pl.String, "role": pl.String, "content": pl.String, "intent": pl.String, "created_at": TIME})
TURN = pl.Struct({"role": pl.String, "content": pl.String})

CONVERSATIONS = pl.Schema(
    {
        "conversation_id": pl.String,
        "tenant_id": pl.String,
        "user": pl.String,  # pseudonym u_…; null where the source names no user
        "bucket": pl.UInt16,  # 0..9999, from the raw user id (else the conversation id) and a fixed salt; splits use only this
        "vertical": pl.String,
        "channel": pl.String,  # `unknown` where the source has none
        "satisfaction_score": pl.Int8,  # 1..5 or null
        "training_consent": pl.Boolean,  # true where the source does not say
        "kind": pl.String,
        "started_at": TIME,
        "ended_at": TIME,
        "messages": pl.List(MESSAGE),  # sorted by time
    }
)

FEEDBACK = pl.Schema(
    {
        "feedback_id": pl.String,
        "tenant_id": pl.String,
        "conversation_id": pl.String,
        "message_id": pl.String,
        "feedback_type": pl.String,
        "rating": pl.Int8,
        "expected_response": pl.String,
        "comment": pl.String,
        "created_at": TIME,
    }
)

EXAMPLES = pl.Schema(
    {
        "message_id": pl.String,
        "conversation_id": pl.String,
        "tenant_id": pl.String,
        "vertical": pl.String,
        "channel": pl.String,
        "user": pl.String,
        "bucket": pl.UInt16,
        "training_consent": pl.Boolean,
        "kind": pl.String,
        "intent": pl.String,  # of the user's turn; `unknown` where null
        "satisfaction_score": pl.Int8,
        "started_at": TIME,
        "created_at": TIME,  # of the reply
        "context": pl.List(TURN),  # alternating, user first and last, at most MAX_TURNS
        "user_text": pl.String,  # the last turn of the context
        "reply": pl.String,
        "user_chars": pl.UInt32,
        "reply_chars": pl.UInt32,
        "error_reply": pl.Boolean,
        "text_key": pl.UInt64,  # of the normalised user text and reply; equal keys are exact duplicates
    }
)

REJECTED = pl.Schema(
    {
        "table": pl.String,
        "id": pl.String,
        "reason": pl.String,
        "detail": pl.String,
        "action": pl.String,
        "conversation_id": pl.String,  # whose row it was, so that an erasure finds it and `explain` can tell; null where unknown
        "user": pl.String,
    }
)
