"""What teachers said, paid for once: `<home>/datasets/<assistant>/teacher_replies.parquet`, by model and prompt.

A question is written down before it is asked, at the price of the longest reply. That row goes where the answer comes, or where
the question was turned away; where nobody can tell (a time-out, a killed process) it stays, counts as paid, and the question is
asked again next time: at most the batch that was under way. Rows carry the ids of the message whose context was asked about, so
that a person's rows leave the file with the person.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.distillation.teacher import MOST_TOKENS, Answer, Ask, Message, Teacher
from finetune_assets.errors import FinetuneError, ProviderUnsettled
from finetune_assets.storage import write_parquet
from finetune_assets.training.provider_formats import CHARS_PER_TOKEN, MESSAGE_TOKENS, REPLY_TOKENS
from finetune_assets.training.remote import RemoteModel

FILE = "teacher_replies.parquet"
AT_ONCE = 4
BATCH = 20
FAILURES = 2
"""Batches in a row in which nothing is answered, after which the teacher is taken as away."""
SCHEMA: dict[str, Any] = {
    "key": pl.String,  # of a question without an answer: with the purchase behind it
    "message_id": pl.String,
    "conversation_id": pl.String,
    "user": pl.String,
    "reply": pl.String,  # null where there is none
    "missing": pl.String,  # why
    "prompt_tokens": pl.Int64,
    "completion_tokens": pl.Int64,
    "usd": pl.Float64,
    "reference": pl.String,  # the purchase that paid for it
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """A training context and whose it is."""

    key: str
    prompt: list[Message]
    ids: dict[str, Any]
    """message_id, conversation_id, user."""


def question(teacher: Teacher, prompt: list[Message], ids: dict[str, Any]) -> Question:
    """Its key names the model, where it is, and the prompt."""
    asked = [teacher.model.provider, teacher.model.base_url, teacher.model.model, MOST_TOKENS, prompt]
    return Question(hashlib.blake2b(json.dumps(asked, ensure_ascii=False).encode(), digest_size=16).hexdigest(), prompt, ids)


class Replies:
    """The file of one assistant."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        rows: list[dict[str, Any]] = pl.read_parquet(self.path).to_dicts() if self.path.exists() else []
        self.rows = {row["key"]: row for row in rows}

    def get(self, key: str) -> Answer | None:
        """A stored answer."""
        row = self.rows.get(key)
        return Answer(row["reply"], row["missing"], row["prompt_tokens"], row["completion_tokens"]) if row else None

    def spent(self, reference: str) -> tuple[float, int]:
        """US dollars and tokens of what a purchase paid for."""
        own = [row for row in self.rows.values() if row["reference"] == reference]
        return sum(row["usd"] or 0.0 for row in own), sum(row["prompt_tokens"] + row["completion_tokens"] for row in own)

    def cost(self, keys: Collection[str]) -> float:
        """US dollars of these answers, whichever purchase paid for them."""
        return sum(row["usd"] or 0.0 for key, row in self.rows.items() if key.partition(" ")[0] in keys)

    def begin(self, asked: Question, model: RemoteModel, reference: str) -> None:
        """Counts a question that is about to be asked as paid, with the longest reply; durable after `save`."""
        unanswered = Answer(None, "unanswered", prompt_tokens(asked.prompt), MOST_TOKENS)
        self._put(f"{asked.key} {reference}", asked, unanswered, model, reference)

    def turned_away(self, asked: Question, reference: str) -> None:
        """Takes back what `begin` has counted: nobody has answered."""
        self.rows.pop(f"{asked.key} {reference}", None)

    def add(self, asked: Question, answer: Answer, model: RemoteModel, reference: str) -> None:
        """Keeps an answer; durable after `save`."""
        self.turned_away(asked, reference)
        self._put(asked.key, asked, answer, model, reference)

    def _put(self, key: str, asked: Question, answer: Answer, model: RemoteModel, reference: str) -> None:
        usd = usd_of(model, answer.prompt_tokens, answer.completion_tokens)
        known = {"reply": answer.reply, "missing": answer.missing, "usd": usd, "reference": reference}
        tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        self.rows[key] = {"key": key, **asked.ids, **known, **tokens}

    def save(self) -> None:
        """Writes the file anew."""
        rows = sorted(self.rows.values(), key=lambda row: row["key"])
        write_parquet(self.path, pl.DataFrame(rows, schema=SCHEMA))


def prompt_tokens(prompt: Sequence[Message]) -> int:
    """Of a prompt, rather too many than too few: the teacher's tokenizer is not here."""
    return round(sum(len(str(m.get("content") or "")) for m in prompt) / CHARS_PER_TOKEN) + MESSAGE_TOKENS * len(prompt)


def usd_of(model: RemoteModel, tokens_in: int, tokens_out: int) -> float | None:
    """At the teacher's price; null where none is known."""
    if model.usd_per_million_input is None or model.usd_per_million_output is None:
        return None
    return (tokens_in * model.usd_per_million_input + tokens_out * model.usd_per_million_output) / 1e6


def estimated(model: RemoteModel, questions: Sequence[Question]) -> tuple[int, float | None]:
    """Tokens of the prompts, and US dollars with usual replies; null where no price is known."""
    tokens = sum(prompt_tokens(one.prompt) for one in questions)
    return tokens, usd_of(model, tokens, REPLY_TOKENS * len(questions))


@dataclass(frozen=True)
class Allowance:
    """Out of which purchase the replies are paid, and how much it may come to."""

    reference: str
    most_usd: float | None = None
    extend: Callable[[float], bool] = lambda _usd: True
    """Reserves so many US dollars for the purchase; whether the budgets have them."""

    def refuses(self, usd: float) -> str | None:
        """Why a purchase may not come to so much; null where it may."""
        if self.most_usd is not None and usd > self.most_usd:
            return f"${self.most_usd:.2f}, what is left of --max-usd,"
        return None if self.extend(usd) else "what is left of the month's budget"


def collect(book: Replies, wanted: Sequence[Question], teacher: Teacher, ask: Ask, pays: Allowance, say: Say) -> int:
    """Asks for what is not in the book, a batch at a time, and never spends more than is allowed; how many are left unasked.

    A batch is begun only if the money would do for its longest possible replies. Raises ProviderUnsettled where the teacher is
    away, what it was where nobody can be asked (a key, a region, a refusal of everybody); what was answered is kept.
    """
    missing = [one for one in {one.key: one for one in wanted}.values() if book.get(one.key) is None]
    done, failed = 0, 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, len(missing), BATCH):
            batch = missing[first : first + BATCH]
            longest = usd_of(teacher.model, sum(prompt_tokens(one.prompt) for one in batch), MOST_TOKENS * len(batch)) or 0.0
            if (short := pays.refuses(book.spent(pays.reference)[0] + longest)) is not None:
                say(f"{teacher.name}: {len(missing) - done} contexts are not asked, {short} would not do for them.")
                break
            for one in batch:
                book.begin(one, teacher.model, pays.reference)
            book.save()
            calls = [pool.submit(_answer, ask, one) for one in batch]
            answers: list[Answer | FinetuneError] = []
            try:
                for one, call in zip(batch, calls, strict=True):
                    answers.append(answer := call.result())
                    if isinstance(answer, Answer):
                        book.add(one, answer, teacher.model, pays.reference)
                        done += 1
                    elif not isinstance(answer, ProviderUnsettled) or answer.turned_away:
                        book.turned_away(one, pays.reference)
            finally:
                book.save()
            away = [answer for answer in answers if isinstance(answer, ProviderUnsettled)]
            refused = next((one for one in answers if isinstance(one, FinetuneError) and one not in away), None)
            if refused is not None:
                raise refused
            failed = failed + 1 if len(away) == len(batch) else 0
            if failed == FAILURES:
                raise ProviderUnsettled(
                    f"{away[0]} {done} new replies are kept; run the same again, it asks for the others only."
                )
            say(f"{teacher.name}: {first + len(batch)} of {len(missing)} contexts asked, ${book.spent(pays.reference)[0]:.4f}")
    return len(missing) - done


def _answer(ask: Ask, one: Question) -> Answer | FinetuneError:
    try:
        return ask(one.prompt)
    except FinetuneError as error:
        return error
