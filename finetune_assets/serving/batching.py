"""Continuous batching: chats join and leave a running batch between two tokens, each with its own adapter (Yu et al. 2022, Orca).

A `Lane` is one base model with any number of LoRA adapters on it. A step is one forward pass of one token a row, whatever the
rows' lengths and adapters. Not thread-safe: one thread steps all lanes.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from finetune_assets.serving.low_rank import Adapters
from finetune_assets.serving.rows import Rows
from finetune_assets.worker import models

ROWS = 32
"""Most rows of a batch."""
NO_ADAPTER = ""
PATIENCE = 10.0
"""Seconds that a patient chat waits for room; then it is let go, since its caller would give up and take that for a fault."""


@dataclass(eq=False)
class Chat:
    """One reply in the making. `deliver` is called with each token, and once with null and the reason why it ended."""

    prompt: list[int]
    most: int
    deliver: Callable[[int | None, str | None], None]
    adapter: str = NO_ADAPTER
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    patient: bool = False
    """Joins only where nobody else waits: shadow replies."""
    since: float = field(default_factory=time.monotonic)
    made: int = 0
    cancelled: bool = False
    random: torch.Generator | None = field(default=None, repr=False)


class Lane:
    """One base model and its running batch."""

    def __init__(self, model: str, dtype: str = "float32") -> None:
        """Loads the model. Raises ModelUnavailable."""
        self.tokenizer: Any = models.load_tokenizer(model)
        self.model: Any = models.load_model(model, dtype)
        self.context = models.context_length(self.model)
        self.ends = set(models.end_ids(self.tokenizer))
        self.adapters = Adapters(self.model)
        self.waiting: deque[Chat] = deque()
        self.patient: deque[Chat] = deque()
        self.rows: list[Chat] = []
        self.cache = Rows(self.model.device)
        self.last = torch.zeros((0,), dtype=torch.long, device=self.model.device)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Puts a LoRA adapter on the base model; its name is never used again for another. Raises ModelUnavailable."""
        self.adapters.load(name, folder)

    def add(self, chat: Chat) -> None:
        """Queues a chat."""
        (self.patient if chat.patient else self.waiting).append(chat)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.rows or self.waiting or self.patient)

    @torch.inference_mode()
    def step(self) -> None:
        """Lets waiting chats in, and makes one token of every running chat."""
        if any(row.cancelled for row in self.rows):
            for row in self.rows:
                if row.cancelled:
                    row.deliver(None, "cancelled")
            self._leave({n for n, row in enumerate(self.rows) if row.cancelled})
        if self.rows:
            self._decode()
        joining = self._joining()
        if joining:
            self._prefill(joining)

    def fail(self, reason: str) -> None:
        """Ends every chat with an error; the lane is empty afterwards."""
        for chat in [*self.rows, *self.waiting, *self.patient]:
            chat.deliver(None, reason)
        self.waiting.clear()
        self.patient.clear()
        self.rows, self.cache = [], Rows(self.model.device)
        self.last = self.last[:0]

    def _joining(self) -> list[Chat]:
        room, joining = ROWS - len(self.rows), list[Chat]()
        while self.patient and time.monotonic() - self.patient[0].since > PATIENCE:
            self.patient.popleft().deliver(None, "busy")
        for queue in (self.waiting, self.patient):
            while queue and len(joining) < room:
                chat = queue.popleft()
                if chat.cancelled:
                    chat.deliver(None, "cancelled")
                else:
                    joining.append(chat)
        return joining

    def _prefill(self, chats: list[Chat]) -> None:
        """The prompts of new chats in one pass, left-padded, then into the running batch."""
        device = self.model.device
        width = max(len(chat.prompt) for chat in chats)
        pad = int(self.tokenizer.pad_token_id)
        ids = torch.tensor([[pad] * (width - len(c.prompt)) + c.prompt for c in chats], device=device)
        mask = torch.tensor([[0] * (width - len(c.prompt)) + [1] * len(c.prompt) for c in chats], device=device)
        cache = DynamicCache()
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache, chats)
        layers: Any = cache.layers
        self.cache.join([(layer.keys, layer.values) for layer in layers], [len(chat.prompt) for chat in chats])
        self.rows += chats
        self.last = torch.cat([self.last, self._choose(logits, chats)])
        self._deliver(len(self.rows) - len(chats))

    def _decode(self) -> None:
        cache, mask, positions = self.cache.step()
        self.last = self._choose(self._forward(self.last[:, None], mask, positions, cache, self.rows), self.rows)
        self._deliver(0)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache, chats: list[Chat]
    ) -> torch.Tensor:
        """Logits of the next token, [rows, vocabulary]."""
        self.adapters.choose([chat.adapter for chat in chats])
        made = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return made.logits[:, -1].float()

    def _choose(self, logits: torch.Tensor, chats: list[Chat]) -> torch.Tensor:
        """The next token of each row: the likeliest, or one drawn where the chat has a temperature."""
        best = logits.argmax(dim=-1)
        for n, chat in enumerate(chats):
            if chat.temperature <= 0:
                continue
            if chat.random is None:
                chat.random = torch.Generator(device=logits.device)
                chat.random.manual_seed(chat.seed) if chat.seed is not None else chat.random.seed()
            shares, order = torch.softmax(logits[n] / chat.temperature, dim=-1).sort(descending=True)
            shares[(shares.cumsum(0) - shares) > chat.top_p] = 0
            best[n] = order[torch.multinomial(shares, 1, generator=chat.random)[0]]
        return best

    def _deliver(self, start: int) -> None:
        """Hands out the newest token of the rows from `start`, and takes out those that have ended."""
        ended: set[int] = set()
        for n, token in enumerate(self.last[start:].tolist(), start=start):
            chat = self.rows[n]
            chat.made += 1
            if token in self.ends:
                chat.deliver(None, "stop")
                ended.add(n)
                continue
            chat.deliver(token, None)
            if chat.made >= chat.most or len(chat.prompt) + chat.made >= self.context:
                chat.deliver(None, "length")
                ended.add(n)
        self._leave(ended)

    def _leave(self, gone: set[int]) -> None:
        """Takes rows out of the batch."""
        if gone:
            stay = self.cache.leave(gone)
            self.rows = [self.rows[n] for n in stay]
            self.last = self.last[stay]
