"""Stored conversations that the source no longer holds: the corpus mirrors its source, so they go when their weeks are built.

A conversation is held as long as the source has its row and a message of it, in whatever week. Stored ids are compared by the
hashes of the index. Ids that are stored as keyed hashes (`p_…`) cannot be: of a week's so many are held as the source has
conversations in it that no stored id names. People who asked to be forgotten do not count, whether their rows were taken out yet
or not.
"""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from finetune_assets.corpus.sources import SourceTables
from finetune_assets.environment import Environment
from finetune_assets.errors import SourceError
from finetune_assets.storage import Store

LEAST = 50
"""Fewer conversations may go, whatever their share."""
KEYED = r"^p_[0-9a-f]{16}$"


def held(conversations: pl.DataFrame, messages: pl.DataFrame) -> pl.DataFrame:
    """id and week of the index's conversations that have a message."""
    return conversations.select("id", "week").join(messages.select(id="conversation"), on="id", how="semi")


def vanished(store: Store, source: SourceTables, now: pl.DataFrame, weeks: Iterable[str], seed: int) -> dict[str, int]:
    """Of each week how many stored conversations are not `held` now; weeks that lost none are left out."""
    gone: dict[str, int] = {}
    for week in sorted(weeks):
        stored = _stored(store, source, week)
        if stored.is_empty():
            continue
        keyed = stored["conversation_id"].str.contains(KEYED)
        ids = stored["conversation_id"].filter(~keyed).str.strip_chars().hash(seed)
        number = int((~ids.is_in(now["id"].implode())).sum())
        if keyed.any():
            own = now["id"].filter(now["week"].dt.to_string() == week).unique()
            number += max(0, int(keyed.sum()) - int((~own.is_in(ids.implode())).sum()))
        if number:
            gone[week] = number
    return gone


def refuse_much(store: Store, source: SourceTables, now: pl.DataFrame, seed: int) -> None:
    """Raises SourceError where more than FINETUNE_MAX_VANISHED of the stored conversations, and LEAST of them, would go."""
    weeks = store.weeks("conversations")
    most, gone = Environment.read().max_vanished, vanished(store, source, now, weeks, seed)
    lost = sum(gone.values())
    if lost < LEAST:
        return
    stored = sum(_stored(store, source, week).height for week in weeks)
    if lost <= most * stored:
        return
    raise SourceError(
        f"{lost:,} of {stored:,} stored conversations ({lost / stored:.0%}) are no longer in the source, those of {told(gone)}; "
        "the corpus mirrors its source, so they would go. Nothing was changed. Usual causes: an export of the newest weeks only "
        "that overwrote the older ones, or an address that fell off FINETUNE_SOURCE. Keep older exports in the folder, or put "
        "the address back. If it is meant, run once with FINETUNE_MAX_VANISHED=1 "
        f"(now {most:g})."
    )


def _stored(store: Store, source: SourceTables, week: str) -> pl.DataFrame:
    """conversation_id and user of a week, less those of erased people; no rows where the week is missing or damaged."""
    path = store.corpus("conversations", week) / "part.parquet"
    try:
        stored = pl.read_parquet(path, columns=["conversation_id", "user"])
    except (FileNotFoundError, pl.exceptions.PolarsError):
        return pl.DataFrame(schema={"conversation_id": pl.String, "user": pl.String})
    return stored.filter(~source.erased(stored))


def told(gone: Iterable[str]) -> str:
    """Weeks in words."""
    weeks = sorted(gone)
    return f"the week {weeks[0]}" if len(weeks) == 1 else f"{len(weeks)} weeks, {weeks[0]} to {weeks[-1]}"
