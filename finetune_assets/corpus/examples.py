"""Makes examples of stored conversations: for each assistant message what was said before it, and the reply.

Several messages in a row by the same speaker are one turn of the context, joined by a newline, without surrounding white space.
What an assistant says before the first user message is no context. A second message of the assistant in a row has the same
context as the first: it ends with the user's turn. An assistant message without a user turn before it makes no example
(`no_user_turn`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from finetune_assets.corpus.near_duplicates import exact_keys, normalise
from finetune_assets.corpus.schema import CODE_VERSIONS, EXAMPLES, TURN
from finetune_assets.corpus.staleness import counts_of, examples_digest, part_digest, stale_examples
from finetune_assets.errors import DataError
from finetune_assets.storage import Store, write_json, write_parquet

__all__ = ["ERROR_REPLIES", "build_examples", "make_examples", "stale_examples"]

MAX_TURNS = 19
"""Most turns of a stored context: an odd number, since roles alternate and the first and the last turn are the user's."""

ERROR_REPLIES: dict[str, tuple[str, ...]] = {
    "es": (
        r"\berror(?:es)?\b",
        r"\bno (?:te |le |lo |la |os )?(?:entiendo|entend[ií]|comprendo|comprend[ií]|he entendido)\b",
        r"\bno (?:te |le |les |os )?pued[eo] ayudar(?:te|le|les|os)?\b",
        r"\balgo (?:ha salido|sali[oó]|fue) mal\b",
    ),
    "en": (
        r"\berrors?\b",
        r"\b(?:do not|don['’]t|did not|didn['’]t) understand\b",
        r"\b(?:cannot|can['’]t|can not|unable to|not able to) help\b",
        r"\bsomething went wrong\b",
    ),
    "pt": (
        r"\berros?\b",
        r"\bn[aã]o (?:te |o |a )?(?:entendo|entendi|compreendo|compreendi)\b",
        r"\bn[aã]o (?:te |o |a |lhe )?(?:posso|consigo) ajudar\b",
        r"\balgo deu errado\b",
    ),
}
"""Regular expressions of replies that report an error or give up, by language; all are tried, without regard to case."""


def build_examples(store: Store, weeks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Writes `corpus/examples` of some weeks from their conversations; gives the numbers of each week.

    The table `examples` counts assistant messages. Raises DataError for a week whose conversations are not there.
    """
    return {week: _build_week(store, week) for week in sorted(set(weeks))}


def _build_week(store: Store, week: str) -> dict[str, Any]:
    source, folder = store.corpus("conversations", week), store.corpus("examples", week)
    made_from = counts_of(source).get("part_digest")
    if made_from is None or not (source / "part.parquet").exists():
        raise DataError(f"Week {week} has no finished conversations in {source}; materialise raw_conversations for it first.")
    conversations = pl.read_parquet(source / "part.parquet")
    frame, dropped = make_examples(conversations)
    write_parquet(folder / "part.parquet", frame)
    left_out = sum(dropped.values())
    counts: dict[str, Any] = {
        "week": week,
        "read": {"examples": frame.height + left_out},
        "kept": {"examples": frame.height},
        "dropped": {"examples": left_out},
        "repaired": {"examples": 0},
        "rejected_by_reason": {"examples": dropped},
        "error_replies": int(frame["error_reply"].sum()),
        "source_digest": examples_digest(made_from),
        "part_digest": part_digest(folder / "part.parquet"),
        "part_bytes": (folder / "part.parquet").stat().st_size,
        "code_version": CODE_VERSIONS["clean_examples"],
    }
    write_json(folder / "counts.json", counts)
    return counts


def make_examples(conversations: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """EXAMPLES of stored conversations, in order of time, and how many assistant messages make none, by reason."""
    numbered = conversations.with_row_index("talk")
    messages = _numbered(numbered)
    turns = _turns(messages)
    contexts = turns.group_by("talk", maintain_order=True).agg(
        pl.struct(pl.col("role"), pl.col("text").alias("content")).alias("turns")
    )
    users = turns.filter(pl.col("role") == "user").select(pl.col("run") + 1, "text", "intent")
    replies = messages.filter(pl.col("role") == "assistant")
    answered = replies.filter(pl.col("turn") > 0).select(
        "talk", "message_id", "created_at", "turn", "run", pl.col("content").alias("reply")
    )
    before = pl.col("turn").cast(pl.Int64) - 1  # turns up to the user's last one: 1, 3, 5, …
    first = pl.max_horizontal(before - MAX_TURNS, 0)
    frame = (
        answered.join(users, on="run", how="inner", maintain_order="left")
        .join(contexts, on="talk", how="inner", maintain_order="left")
        .join(numbered.drop("messages", "ended_at"), on="talk", how="inner", maintain_order="left")
        .with_columns(pl.col("turns").list.slice(first, before - first).cast(pl.List(TURN)).alias("context"))
        .with_columns(
            pl.col("text").alias("user_text"),
            pl.col("intent").fill_null("unknown"),
            pl.col("text").str.len_chars().alias("user_chars"),
            pl.col("reply").str.len_chars().alias("reply_chars"),
            pl.col("reply").str.contains(_any_error()).alias("error_reply"),
        )
    )
    frame = frame.with_columns(_text_keys(frame).alias("text_key"))
    missing = replies.height - frame.height
    return frame.select(pl.col(name).cast(dtype) for name, dtype in EXAMPLES.items()), {
        "no_user_turn": missing
    } if missing else {}


def _numbered(conversations: pl.DataFrame) -> pl.DataFrame:
    """One row a message with its turn: 1, 3, 5, … are the user's, 2, 4, … the assistant's, 0 is before any user's. `run` numbers
    the turns of all conversations (`talk`), with a gap after each of them."""
    messages = conversations.select("talk", "messages")
    messages = messages.explode("messages").drop_nulls("messages").unnest("messages")
    is_user, new = pl.col("role") == "user", pl.col("talk") != pl.col("talk").shift(1)
    before = is_user.shift(1, fill_value=False) & ~new.fill_null(True)
    messages = messages.with_columns(pl.col("content").str.strip_chars(), starts=(is_user != before).cast(pl.UInt32))
    messages = messages.with_columns(run=pl.col("starts").cum_sum() + 2 * pl.col("talk"))
    first = pl.when(new.fill_null(True)).then(pl.col("run") - pl.col("starts")).forward_fill()  # where each conversation begins
    return messages.with_columns(turn=pl.col("run") - first)


def _turns(messages: pl.DataFrame) -> pl.DataFrame:
    """One row a turn: its speaker, its text, and the last intent that is known of it."""
    said = messages.filter(pl.col("turn") > 0).select("run", "talk", "role", pl.col("content").alias("text"), "intent")
    turns = said.filter(pl.col("run").ne_missing(pl.col("run").shift(1)))
    several = said.filter(pl.col("run").is_duplicated()).group_by("run", maintain_order=True)  # most turns are one message
    joined = several.agg(pl.col("text").str.join("\n"), pl.col("intent").drop_nulls().last())
    at = turns["run"].search_sorted(joined["run"])
    return turns.with_columns(turns[name].scatter(at, joined[name]) for name in ("text", "intent"))


def _any_error() -> str:
    return "(?i)" + "|".join(pattern for patterns in ERROR_REPLIES.values() for pattern in patterns)


def _text_keys(frame: pl.DataFrame) -> pl.Series:
    """64 bits of the normalised user text and reply."""
    both = normalise(frame["user_text"]) + "\n" + normalise(frame["reply"])
    return pl.Series("text_key", exact_keys(both), dtype=pl.UInt64)
