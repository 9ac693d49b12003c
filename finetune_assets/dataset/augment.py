"""Synthetic training rows: other ways to ask what few people asked. The user's turn varies, the reply is the parent's.

An intent is filled up where it has fewer training rows than `below` times the mean of the intents, the smallest first, until
`share` of the training rows is synthetic. Parents are taken best source first, then by hash. A variation is left out where the
rules of `filters` drop it, where it holds personal data, and where it equals or nearly equals a held-out or negatively rated
example, or equals a training one. It carries its parent's ids, intent and user, and its source is `synthetic`; it never stands in
validation, test or preferences.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from typing import Any

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.dataset.balance import best_first
from finetune_assets.dataset.duplicates import twins_in, with_text
from finetune_assets.dataset.selection import CORRECTED, SYNTHETIC, Left, content, holds_personal
from finetune_assets.dataset.splits import TRAIN
from finetune_assets.dataset.variations import vary
from finetune_assets.dataset.wording import worded
from finetune_assets.storage import Store

Variations = Callable[[pl.DataFrame, int], list[list[str]]]
"""Parents (message_id, conversation_id, user, user_text, reply) and how many each, to that many texts for each, or fewer."""
SPARE = 1.25
"""Candidates made for each row that is wanted: the rules leave some out."""
UNKNOWN = "unknown"


def light(assistant: Assistant) -> Variations:
    """Variations made here; the same ones for the same text and seed."""

    def make(parents: pl.DataFrame, count: int) -> list[list[str]]:
        rows = parents.select("user_text", "reply", opens=pl.col("context").list.len() == 1).rows()
        return [_varied(text, reply, count, assistant, opens) for text, reply, opens in rows]

    return make


def _varied(text: str, reply: str, count: int, assistant: Assistant, opens: bool) -> list[str]:
    found: dict[str, None] = {}
    for number in range(2 * count):
        if len(found) == count:
            break
        key = f"{assistant.augment.seed}\n{number}\n{text}\n{reply}"
        chance = random.Random(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"))
        made = vary(text, reply, assistant.language, chance, opens=opens)
        if made is not None:
            found[made] = None
    return list(found)


def variations_of(store: Store, assistant: Assistant) -> Variations:
    """What the settings name: light variations, or a language model."""
    llm = assistant.augment.llm
    return light(assistant) if llm is None else worded(llm, assistant, store.datasets(assistant.name))


def wanted(sizes: dict[str, int], share: float, below: float) -> dict[str, int]:
    """How many synthetic rows each intent gets, the smallest intent first. `sizes`: training rows by intent."""
    named = {intent: size for intent, size in sizes.items() if intent != UNKNOWN}
    if not named or share <= 0:
        return {}
    goal = math.ceil(below * sum(named.values()) / len(named) - 1e-9)
    budget = math.floor(share * sum(sizes.values()) / (1 - share) + 1e-9)
    found: dict[str, int] = {}
    for intent, size in sorted(named.items(), key=lambda item: (item[1], item[0])):
        take = min(goal - size, budget)
        if take > 0:
            found[intent] = take
            budget -= take
    return found


def parents_of(kept: pl.DataFrame, assistant: Assistant) -> pl.DataFrame:
    """The kept examples that are to be varied, those of each intent best first."""
    each = assistant.augment.per_example if assistant.augment.llm else 1  # a request costs the same for several
    train, plan = pl.col("split") == TRAIN, _plan(kept, assistant)
    own = ((kept.filter(train & (pl.col("intent") == intent)), math.ceil(_candidates(n) / each)) for intent, n in plan.items())
    return pl.concat([kept.clear(), *(best_first(rows).head(most) for rows, most in own)])


def augment(
    kept: pl.DataFrame,
    parents: pl.DataFrame,
    hidden: tuple[pl.Series, pl.Series],
    assistant: Assistant,
    make: Variations,
    left: Left,
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Synthetic rows with the columns of `parents`, and notes: rows by intent, what was left out by reason, who made them.

    `kept` holds the examples that are kept, `parents` those of `parents_of` with their contexts; `hidden` are the normalised
    texts of the held-out preferences and KTO rows, and of the negatively rated ones, which no training row may resemble either;
    `left`: what scrubbing left in the texts on purpose.
    """
    settings, plan = assistant.augment, _plan(kept, assistant)
    made: list[pl.DataFrame] = []
    for intent, need in plan.items():
        own = parents.filter(pl.col("intent") == intent)
        count = min(settings.per_example, math.ceil(_candidates(need) / max(own.height, 1)))
        made.append(_varied_rows(own, make(own, count)))
    rows = pl.concat([parents.clear(), *made])
    left_out: dict[str, int] = {}
    if not rows.is_empty():
        rows, left_out = _filtered(rows, kept, hidden, assistant, left)
    place = pl.int_range(pl.len()).over("intent")
    rows = rows.filter(place < pl.col("intent").replace_strict(plan, default=0, return_dtype=pl.Int64))
    filled = {intent: int(n) for intent, n in sorted(rows["intent"].value_counts().rows())}
    total = int((kept["split"] == TRAIN).sum()) + rows.height
    notes: dict[str, Any] = {
        "rows": rows.height,
        "share": round(rows.height / max(total, 1), 4),
        "by": settings.llm.model if settings.llm else "light",
        "intents": {intent: {"wanted": need, "made": filled.get(intent, 0)} for intent, need in plan.items()},
        "left_out": left_out,
    }
    return rows, notes


def _plan(kept: pl.DataFrame, assistant: Assistant) -> dict[str, int]:
    sizes = kept.select("split", "intent").filter(pl.col("split") == TRAIN)["intent"].value_counts().rows()
    return wanted({str(intent): int(n) for intent, n in sizes}, assistant.augment.share, assistant.augment.below)


def _candidates(need: int) -> int:
    return math.ceil(SPARE * need)


def _varied_rows(parents: pl.DataFrame, texts: list[list[str]]) -> pl.DataFrame:
    """Each parent's first variation, then each one's second, and so on."""
    rounds = sorted((turn, parent) for parent, own in enumerate(texts) for turn in range(len(own)))
    said = pl.Series("_said", [texts[parent][turn] for turn, parent in rounds], dtype=pl.String)
    many = parents[[parent for _, parent in rounds]].with_columns(said)
    last = pl.struct(role=pl.lit("user"), content="_said")
    context = pl.concat_list(pl.col("context").list.head(pl.col("context").list.len() - 1), last)
    return many.with_columns(
        context=context,
        user_text="_said",
        user_chars=pl.col("_said").str.len_chars(),
        error_reply=pl.col("error_reply") & (pl.col("source") != CORRECTED),  # says what the original was
        source=pl.lit(SYNTHETIC),
        replaced=pl.lit([], pl.List(pl.String)),
    ).drop("_said")


def _filtered(
    rows: pl.DataFrame, kept: pl.DataFrame, hidden: tuple[pl.Series, pl.Series], assistant: Assistant, left: Left
) -> tuple[pl.DataFrame, dict[str, int]]:
    threshold = assistant.filters.near_duplicate
    rows = with_text(content(rows.with_columns(reason=pl.lit(None, pl.String)), assistant.filters), "reply")
    texts, (unseen, negative) = kept.select("split", "text"), hidden
    heldout = pl.concat([texts.filter(pl.col("split") != TRAIN)["text"], unseen])
    trained = texts.filter((pl.col("split") == TRAIN) & pl.col("text").is_in(rows["text"].implode()))["text"]
    equal = pl.col("text").is_in(trained.implode()) | ~pl.col("text").is_first_distinct()
    rules = (
        ("personal_data_residual", holds_personal(rows, ["reply"], left)),
        ("twin_held_out", pl.Series(twins_in(rows["text"], heldout, threshold) >= 0)),
        ("same_as_negative", pl.Series(twins_in(rows["text"], negative, threshold) >= 0)),
        ("exact_duplicate", rows.select(equal).to_series()),
    )
    reason = pl.coalesce("reason", *[pl.when(pl.lit(found)).then(pl.lit(name)) for name, found in rules])
    rows = rows.with_columns(reason=reason)
    counted = rows["reason"].drop_nulls().value_counts().rows()
    left_out = {str(name): int(n) for name, n in sorted(counted)}
    return rows.filter(pl.col("reason").is_null()).drop("text", "reason"), left_out
