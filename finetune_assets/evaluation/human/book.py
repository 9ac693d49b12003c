"""The ledger's table `ratings`: one row a rater and item, the last answer counts; and ratings as files, in and out."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from finetune_assets.errors import DataError
from finetune_assets.evaluation.human.study import CHOICES, TAGS, Study
from finetune_assets.registry.tables import now, ratings
from finetune_assets.storage import write_parquet, write_text


@dataclass(frozen=True)
class Rating:
    """One answer. `choice`: the candidate that won, `tie`, `both_bad`; `accept` or `reject` in a review."""

    assistant: str
    study: str
    item: str
    rater: str
    choice: str
    left: str
    """Candidate on the left side."""
    tags: list[str]
    seconds: float | None = None


def record(engine: sa.Engine, rating: Rating) -> None:
    """Stores an answer; a later one of the same rater to the same item replaces it."""
    key = [ratings.c[name] == getattr(rating, name) for name in ("assistant", "study", "item", "rater")]
    values = {"choice": rating.choice, "left": rating.left, "tags": rating.tags, "seconds": rating.seconds, "created_at": now()}
    for _ in range(2):
        with engine.begin() as connection:
            if connection.execute(sa.update(ratings).where(*key).values(values)).rowcount:
                return
        try:
            with engine.begin() as connection:
                connection.execute(sa.insert(ratings).values(**asdict(rating), created_at=values["created_at"]))
                return
        except IntegrityError:  # the same page was sent twice at once: the other one is there now
            continue


def of_study(engine: sa.Engine, assistant: str, study: str) -> list[Rating]:
    """Every answer of a study, by item and rater."""
    names = [ratings.c[name] for name in Rating.__dataclass_fields__]
    query = sa.select(*names).where(ratings.c.assistant == assistant, ratings.c.study == study)
    with engine.connect() as connection:
        rows = connection.execute(query.order_by(ratings.c.item, ratings.c.rater)).mappings()
        return [Rating(**{str(key): value for key, value in row.items()}) for row in rows]


def rating_of(study: Study, rater: str, item: str, choice: str, tags: Sequence[str], seconds: float | None) -> Rating:
    """A page's answer as a rating: `left` and `right` become candidates. Raises DataError for what the study does not have."""
    if item not in study.raters.get(rater, ()):
        raise DataError(f"{item} is not one of the items of {rater}.")
    if choice not in CHOICES[study.kind]:
        raise DataError(f"{choice!r} is none of {', '.join(CHOICES[study.kind])}.")
    sides = study.sides(study.item(item), rater)
    won = {"left": sides[0], "right": sides[-1]}.get(choice, choice)
    kept = [tag for tag in TAGS[study.kind] if tag in tags]
    return Rating(study.assistant, study.name, item, rater, won, sides[0], kept, seconds)


def export(study: Study, rated: Sequence[Rating], folder: Path) -> dict[str, int]:
    """Writes ratings.jsonl (raw), preferences.jsonl (TRL, conversational), and of a review feedback.parquet (a source of the
    corpus: a rejected example is a reply with negative feedback); the number of rows of each."""
    prompts = {item.item: item for item in study.items}
    raw = [json.dumps(asdict(rating), ensure_ascii=False) for rating in rated]
    written = {"ratings.jsonl": _lines(folder / "ratings.jsonl", raw)}
    if study.kind == "pairs":
        preferences: list[str] = []
        for name in sorted({rating.item for rating in rated}):
            won = {rating.choice for rating in rated if rating.item == name}
            winner = next(iter(won)) if len(won) == 1 else ""
            if winner in study.candidates:  # raters who disagree, ties and pairs of bad replies teach nothing
                item = prompts[name]
                loser = next(other for other in study.candidates if other != winner)
                prompt = [*([{"role": "system", "content": item.system}] if item.system else []), *item.context]
                chosen, rejected = ([{"role": "assistant", "content": item.replies[of]}] for of in (winner, loser))
                said = {"chosen": chosen, "rejected": rejected}
                preferences.append(json.dumps({"prompt": prompt, **said}, ensure_ascii=False))
        written["preferences.jsonl"] = _lines(folder / "preferences.jsonl", preferences)
    else:
        written["feedback.parquet"] = _feedback(study, rated, folder / "feedback.parquet")
    return written


def read_ratings(path: Path, study: Study) -> list[Rating]:
    """Raw ratings of a file. Raises DataError naming the line that is wrong."""
    made: list[Rating] = []
    allowed = {*study.candidates, "tie", "both_bad"} if study.kind == "pairs" else {"accept", "reject"}
    items = {item.item for item in study.items}
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values: dict[str, Any] = json.loads(line)
            values |= {"assistant": study.assistant, "study": study.name}
            rating = Rating(**values)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}:{n}: not a rating: {error}") from None
        if rating.choice not in allowed or rating.item not in items:
            raise DataError(f"{path}:{n}: item {rating.item!r} or choice {rating.choice!r} is not of study {study.name}.")
        made.append(rating)
    return made


def _lines(path: Path, lines: Sequence[str]) -> int:
    write_text(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def _feedback(study: Study, rated: Sequence[Rating], path: Path) -> int:
    items = {item.item: item for item in study.items}
    at = datetime.datetime.now(datetime.UTC)
    rows: list[dict[str, Any]] = [
        {
            "feedback_id": f"review_{hashlib.blake2b(f'{r.study}/{r.item}/{r.rater}'.encode(), digest_size=8).hexdigest()}",
            "tenant_id": items[r.item].tenant_id,
            "conversation_id": items[r.item].conversation_id,
            "message_id": items[r.item].message_id,
            "feedback_type": "positive" if r.choice == "accept" else "negative",
            "rating": None,
            "expected_response": None,
            "comment": ", ".join(r.tags) or None,
            "created_at": at,
        }
        for r in rated
    ]
    kinds = {"rating": pl.Int8, "expected_response": pl.String, "comment": pl.String}
    if rows:
        write_parquet(path, pl.DataFrame(rows, schema_overrides=kinds))
    return len(rows)
