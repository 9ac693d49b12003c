"""A chat as rows of the journal: the request, the conversation's texts without personal data, the shadow's reply.

The platform's tables get what the platform itself would write, so that the corpus reads them like any other conversation.
"""

from __future__ import annotations

import datetime

from finetune_assets.corpus.forms import RESULT
from finetune_assets.corpus.personal_data import find, scrub_conversation
from finetune_assets.serving.exchange import Exchange
from finetune_assets.serving.intake import clean
from finetune_assets.serving.journal import Row

CONTEXT_TURNS = 8
"""Turns before the newest that are looked at when personal data are replaced."""


def look_ahead(exchange: Exchange) -> None:
    """Looks for personal data in what was said before the reply is there; `scrub_conversation` remembers it."""
    if exchange.ask.assistant.serving.texts == "scrubbed":
        for turn in exchange.turns[-CONTEXT_TURNS - 1 :]:
            find(turn["content"])


def request_row(exchange: Exchange, kind: str, key: str | None) -> Row:
    """Everything of ours about a chat; `kind`: live, shadow; `key`: of its history, where the client names no conversation."""
    ask, usage, error = exchange.ask, exchange.reply.usage, exchange.error
    error = None if error is None else clean(error)
    if error is not None and ask.assistant.serving.texts != "raw":  # an upstream may quote what it was asked
        error = scrub_conversation([error])[0][0]
    values = {
        "request_id": exchange.id,
        "assistant": ask.assistant.name,
        "tenant_id": ask.tenant,
        "user": exchange.user,
        "conversation_id": exchange.conversation,
        "message_id": exchange.message_id,
        "kind": kind,
        "rollout": exchange.state.salt,
        "generation": exchange.state.generation,
        "step": exchange.state.step,
        "assigned_arm": exchange.assigned.name,
        "served_arm": exchange.served.name,
        "kept": exchange.kept,
        "version": exchange.served.version or "base",
        "outcome": exchange.outcome,
        "status": exchange.status,
        "error": error,
        "seconds": exchange.seconds,
        "first_token_seconds": exchange.first_token,
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "usd": exchange.usd,
        "user_chars": len(exchange.turns[-1]["content"]) if exchange.turns else 0,
        "reply_chars": len(exchange.reply.text),
        "created_at": ask.at.isoformat(),
        "history_key": key,
    }
    return "requests", values


def text_rows(exchange: Exchange, turns: list[dict[str, str]]) -> list[Row]:
    """The user's message, or the answers of tools, and the reply (the last of `turns`); of a conversation that is new here, what
    was said before too.

    Empty where the assistant keeps no texts.
    """
    ask = exchange.ask
    if ask.assistant.serving.texts == "none":
        return []
    done = ask.at + datetime.timedelta(seconds=max(exchange.seconds, 1e-6))
    before = max(0, len(turns) - 2 - CONTEXT_TURNS)
    texts = [turn["content"] for turn in turns[before:]]
    if ask.assistant.serving.texts == "scrubbed":
        texts, _ = scrub_conversation(texts)
    rows: list[Row] = [("conversations", _conversation(exchange))] if exchange.is_new else []
    first = 0 if exchange.is_new else len(texts) - 2
    while first > 0 and all(turn["content"].startswith(RESULT) for turn in turns[before:][first - 1 : first + 1]):
        first -= 1
    for n in range(first, len(texts)):
        is_reply = n == len(texts) - 1
        at = done if is_reply else ask.at - datetime.timedelta(microseconds=len(texts) - 2 - n)
        message = {
            "message_id": exchange.message_id if is_reply else f"t{before + n}-{exchange.id}",
            "conversation_id": exchange.conversation,
            "role": turns[before + n]["role"],
            "content": texts[n],
            "intent": None,
            "created_at": at.isoformat(),
        }
        rows.append(("messages", message))
    return rows


def _conversation(exchange: Exchange) -> dict[str, str | None]:
    ask = exchange.ask
    return {
        "conversation_id": exchange.conversation,
        "tenant_id": ask.tenant,
        "user_id": exchange.user if ask.assistant.serving.users == "pseudonym" else ask.user,
        "vertical": ask.vertical,
        "channel": ask.channel,
        "satisfaction_score": None,
        "started_at": ask.at.isoformat(),
        "ended_at": None,
    }


def shadow_rows(made: Exchange, live: Exchange) -> list[Row]:
    """A shadow's request, and what it would have said to the user of `live`."""
    rows = [request_row(made, "shadow", None)]
    texts, text = made.ask.assistant.serving.texts, clean(made.reply.text).strip()
    if not text or texts == "none":
        return rows
    if texts == "scrubbed":
        said = [turn["content"] for turn in live.turns[-CONTEXT_TURNS:]]
        text = scrub_conversation([*said, text])[0][-1]
    values = {
        "request_id": made.id,
        "assistant": made.ask.assistant.name,
        "live_message_id": live.message_id,
        "version": made.served.version or "base",
        "content": text,
        "created_at": made.ask.at.isoformat(),
    }
    return [*rows, ("shadow_replies", values)]
