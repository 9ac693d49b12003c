"""One chat while it is answered: what was asked, which arm it was assigned, who answered, and how that ended."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_assets.corpus.forms import Unusable, call_names, calls_of, calls_text, result_text
from finetune_assets.registry import Rollout
from finetune_assets.serving.assignment import Arm
from finetune_assets.serving.intake import Ask, clean, without_slash
from finetune_assets.serving.models import model_name
from finetune_assets.serving.upstream import Reply


@dataclass
class Exchange:
    """What is known of one chat. `status` is HTTP's. `outcome` is the assigned arm's: ok, error, timeout, policy; and two that
    count against nobody: gone (the client left, or was told to come back), refused (the upstream finds the request wrong;
    in shadow also: does not know the candidate).
    `conversation` is the stored id."""

    ask: Ask
    state: Rollout
    assigned: Arm
    kept: bool
    conversation: str
    is_new: bool
    user: str
    turns: list[dict[str, str]]
    speaker: str | None = None
    """By whom the chat is found again in its history: the user's pseudonym, empty for nobody named; null where the client names
    its conversation."""
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    served: Arm = field(init=False)
    outcome: str = "ok"
    error: str | None = None
    refusal: dict[str, Any] = field(default_factory=dict[str, Any])
    """What an upstream finds wrong with the request, in OpenAI's shape; empty where nothing."""
    status: int = 200
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    first_token: float | None = None
    usd: float | None = None
    reply: Reply = field(default_factory=Reply)

    def __post_init__(self) -> None:
        self.served = self.assigned

    @property
    def conversation_id(self) -> str:
        """The conversation's id as its client knows it."""
        return self.conversation.removeprefix(f"{without_slash(self.ask.tenant)}/")

    @property
    def model(self) -> str:
        """Name of the version that answers."""
        return model_name(self.ask.assistant.name, self.served.version)

    @property
    def message_id(self) -> str:
        """The reply's, by which feedback finds it."""
        return f"m-{self.id}"

    @property
    def said(self) -> str:
        """The reply as it is stored; empty where it says nothing and calls no tool."""
        return _text(self.reply.text, self.reply.message.get("tool_calls") if self.reply.ended else None)


def turns_of(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What was said, the system aside, in the texts that the corpus has for calls of tools and their answers (`forms`)."""
    all_of_them, turns = list(messages), list[dict[str, str]]()
    names = call_names(all_of_them)
    for message in all_of_them:
        text = str(message["content"])
        if message["role"] == "assistant":
            turns.append({"role": "assistant", "content": _text(text, message.get("tool_calls"))})
        elif message["role"] == "tool":
            named = str(message.get("name") or names.get(str(message.get("tool_call_id"))) or "")
            turns.append({"role": "user", "content": clean(result_text(named, text.strip()))})
        elif message["role"] == "user":
            turns.append({"role": "user", "content": text})
    return turns


def _text(text: str, calls: Any) -> str:
    """A reply with its calls; without those that are none."""
    if calls:
        with contextlib.suppress(Unusable, RecursionError):
            return clean(calls_text(calls_of(calls), text.strip()))
    return clean(text).strip()
