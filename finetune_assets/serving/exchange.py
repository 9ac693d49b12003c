"""One chat while it is answered: what was asked, which arm it was assigned, who answered, and how that ended."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from finetune_assets.registry import Rollout
from finetune_assets.serving.assignment import Arm
from finetune_assets.serving.intake import Ask, without_slash
from finetune_assets.serving.models import model_name
from finetune_assets.serving.upstream import Reply


@dataclass
class Exchange:
    """What is known of one chat. `status` is HTTP's. `outcome` is the assigned arm's: ok, error, timeout, policy; and two that
    count against nobody: gone (the client left, or was told to come back), refused (the upstream finds the request wrong).
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
