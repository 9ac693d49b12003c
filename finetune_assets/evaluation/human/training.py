"""Ratings of an assistant's studies as its data set reads them: see `dataset.ratings`.

A pair counts where all of its raters chose the same reply: ties, pairs of bad replies and disagreement teach nothing. An example
of a review is rejected where as many raters refused it as accepted it, or more; that verdict is of its text, not of its message.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import sqlalchemy as sa

from finetune_assets.dataset.ratings import Ratings
from finetune_assets.dataset.tool_calls import as_texts
from finetune_assets.evaluation.human.study import Item, Study, folder, load
from finetune_assets.registry.tables import ratings
from finetune_assets.storage import Store


def ratings_of(store: Store, engine: sa.Engine, assistant: str) -> Ratings:
    """What raters said in all studies of an assistant, whatever their order."""
    names = sorted(path.parent.name for path in folder(store, assistant).glob("*/study.json"))
    query = sa.select(ratings.c.study, ratings.c.item, ratings.c.choice, ratings.c.created_at).where(
        ratings.c.assistant == assistant
    )
    with engine.connect() as connection:
        rows = connection.execute(query.order_by(ratings.c.study, ratings.c.item, ratings.c.rater)).all()
    given: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for study, item, choice, at in rows:
        given.setdefault((study, item), []).append((choice, at))
    pairs: list[tuple[object, ...]] = []
    rejected: list[tuple[str, str]] = []
    for study in (load(store, assistant, name) for name in names):
        for item in study.items:
            said = given.get((study.name, item.item), [])
            choices = Counter(choice for choice, _ in said)
            if study.kind == "pairs" and (pair := _pair(study, item, choices)) is not None:
                turns = as_texts({"prompt": item.context})["prompt"]
                pairs.append((item.message_id, turns, *pair, max(at for _, at in said)))
            elif study.kind == "review" and choices["reject"] and choices["reject"] >= choices["accept"]:
                rejected.append((item.message_id, item.replies["example"].strip()))
    return Ratings.of(pairs, rejected)


def _pair(study: Study, item: Item, choices: Counter[str]) -> tuple[str, str] | None:
    """The reply that all raters chose, and the other."""
    winner = next(iter(choices), "") if len(choices) == 1 else ""
    if winner not in study.candidates:
        return None
    loser = next(name for name in study.candidates if name != winner)
    return item.replies[winner], item.replies[loser]
