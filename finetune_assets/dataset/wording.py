"""Other wordings of requests by a language model behind any OpenAI-compatible endpoint.

Answers are paid for once: they are kept in `<home>/datasets/<assistant>/wordings.parquet` by model and request, so that the same
data give the same data set again. What belongs to no parent of this build is dropped from that file, so a person's words leave it
with the person. The key comes from the environment and goes nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets import once
from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.data import VariationModel
from finetune_assets.assistants.settings.group import HERE
from finetune_assets.dataset.variations import keeps_slots
from finetune_assets.errors import SettingsError, SourceError
from finetune_assets.storage import write_parquet

Row = dict[str, Any]
LANGUAGES = {"es": "Spanish", "en": "English", "pt": "Portuguese"}
PROMPT = (
    "Rewrite a message that a customer sent to a business's chat assistant, in {count} different ways, as other people would "
    "type it in a chat, in {language}. Keep its meaning, and keep every name, number, date, time, price and [PLACEHOLDER] as it "
    "is. Answer with a JSON array of {count} strings and nothing else."
)
SAVE_EVERY = 20  # paid answers that a killed process can lose
FILE = "wordings.parquet"
_SCHEMA = {"key": pl.String, "message_id": pl.String, "conversation_id": pl.String, "user": pl.String, "said": pl.List(pl.String)}


def leaves(assistant: Assistant) -> bool:
    """Whether its settings send texts of users to an address outside this machine."""
    llm = assistant.augment.llm
    return llm is not None and assistant.augment.share > 0 and not HERE.match(llm.base_url)


def check_permission(assistant: Assistant, forbidding: Collection[str]) -> None:
    """Raises SettingsError where texts would leave this machine and the assistant, or tenants with rows in its data
    (`forbidding`), say that nothing may."""
    if assistant.augment.llm is None or not leaves(assistant) or (assistant.remote.allowed and not forbidding):
        return
    whose, mend = assistant.name, "Remove augment.llm, name a model on this machine"
    if assistant.remote.allowed:
        whose = f"{', '.join(sorted(forbidding))} in its data"
        mend = f"Add {'them' if len(forbidding) > 1 else 'it'} to filters.exclude_tenants, remove augment.llm"
    raise SettingsError(
        f"{assistant.name}: the settings of {whose} say `remote.allowed: false`, so no text is sent to augment.llm "
        f"({assistant.augment.llm.base_url}). {mend}, or allow it."
    )


def worded(llm: VariationModel, assistant: Assistant, folder: Path) -> Callable[[pl.DataFrame, int], list[list[str]]]:
    """Makes variations by asking `llm`, within its limits for this build; parents beyond them get none.

    Raises SettingsError where the key is missing, SourceError where the endpoint fails. A request is sent again only where it was
    certainly not answered (`once`): it is paid for.
    """
    known = _Known(folder / FILE)
    spent = {"requests": 0, "usd": 0.0}

    def make(parents: pl.DataFrame, count: int) -> list[list[str]]:
        made: list[list[str]] = []
        try:
            for parent in parents.select("message_id", "conversation_id", "user", "user_text", "reply").to_dicts():
                instruction = PROMPT.format(count=count, language=LANGUAGES[assistant.language])
                key = _key(llm.model, instruction, str(parent["user_text"]))
                if key not in known.answers and not _exhausted(llm, spent):
                    known.add(key, parent, _ask(llm, instruction, str(parent["user_text"]), spent))
                said = known.take(key, parent)
                text, reply = str(parent["user_text"]), str(parent["reply"])
                kept = [t for t in said if t != text and keeps_slots(text, t, reply, assistant.language)]
                made.append(list(dict.fromkeys(kept))[:count])
        finally:
            known.save()
        return made

    return make


def _exhausted(llm: VariationModel, spent: dict[str, float]) -> bool:
    return spent["requests"] >= llm.max_requests or (llm.max_usd is not None and spent["usd"] >= llm.max_usd)


def _key(model: str, instruction: str, text: str) -> str:
    return hashlib.blake2b(f"{model}\n{instruction}\n{text}".encode(), digest_size=16).hexdigest()


def _ask(llm: VariationModel, instruction: str, text: str, spent: dict[str, float]) -> list[str]:
    import openai

    key = os.environ.get(llm.api_key_env)
    if not key:
        raise SettingsError(
            f"augment.llm asks {llm.base_url} for variations, but the environment variable {llm.api_key_env} is not set. "
            "Set it, name another one in augment.llm.api_key_env, or remove augment.llm."
        )
    spent["requests"] += 1
    for attempt in range(once.TRIES):
        try:
            with openai.OpenAI(base_url=llm.base_url, api_key=key, timeout=60, max_retries=0) as client:
                answer = client.chat.completions.create(
                    model=llm.model,
                    messages=[{"role": "system", "content": instruction}, {"role": "user", "content": text}],
                    temperature=0.8,
                )
            break
        except openai.OpenAIError as error:
            status = getattr(error, "status_code", None)
            after = getattr(getattr(error, "response", None), "headers", {}).get("retry-after")
            if once.turned_away(status, after, error.__cause__) and attempt + 1 < once.TRIES:
                once.wait(attempt, once.seconds(after))
                continue
            raise SourceError(
                f"The endpoint {llm.base_url} (model {llm.model}) gave no variation: {type(error).__name__}"
                f"{f' {status}' if status else ''}. Check augment.llm and the key in {llm.api_key_env}, or remove augment.llm."
            ) from None
    else:
        raise AssertionError("the last try breaks or raises")
    tokens = answer.usage.total_tokens if answer.usage else 0
    spent["usd"] += tokens * (llm.usd_per_million_tokens or 0.0) / 1e6
    return parse(answer.choices[0].message.content or "" if answer.choices else "")


def parse(answer: str) -> list[str]:
    """The texts of a JSON array, wherever it stands in the answer; none where there is no such array."""
    start, end = answer.find("["), answer.rfind("]")
    try:
        found = json.loads(answer[start : end + 1]) if 0 <= start < end else []
    except json.JSONDecodeError:
        return []
    return [text.strip() for text in found if isinstance(text, str) and text.strip()]


class _Known:
    """Answers that were paid for, by key; `save` keeps those that this build used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        rows: list[Row] = pl.read_parquet(path).to_dicts() if path.exists() else []
        self.answers: dict[str, list[str]] = {row["key"]: row["said"] for row in rows}
        self.used: dict[str, Row] = {}
        self.stored = {row["key"]: row for row in rows}
        self.unsaved = 0

    def add(self, key: str, parent: Row, said: list[str]) -> None:
        """A new answer; saved with every SAVE_EVERY of them."""
        self.answers[key] = said
        self.take(key, parent)
        self.unsaved += 1
        if self.unsaved >= SAVE_EVERY:
            self._write([*self.stored.values(), *(row for key, row in self.used.items() if key not in self.stored)])
            self.unsaved = 0

    def take(self, key: str, parent: Row) -> list[str]:
        """The answer, if there is one."""
        if key in self.answers:
            ids = {name: parent[name] for name in ("message_id", "conversation_id", "user")}
            self.used[key] = {"key": key, **ids, "said": self.answers[key]}
        return self.answers.get(key, [])

    def save(self) -> None:
        """Writes what this build used so far."""
        if self.used.keys() != self.stored.keys() or self.unsaved:
            self._write(list(self.used.values()))

    def _write(self, rows: list[Row]) -> None:
        write_parquet(self.path, pl.DataFrame(sorted(rows, key=lambda row: str(row["key"])), schema=_SCHEMA))
