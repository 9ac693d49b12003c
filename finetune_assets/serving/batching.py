"""Continuous batching: chats join and leave a running batch between two tokens, each with its own adapter (Yu et al. 2022, Orca).

A `Lane` is one base model with any number of LoRA adapters on it. A step is one forward pass of one token a row, whatever the
rows' lengths and adapters. Not thread-safe: one thread steps all lanes.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from finetune_assets.serving.low_rank import Adapters
from finetune_assets.serving.prefixes import Prefixes
from finetune_assets.serving.rows import Layers, Rows
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
    shared: int = 0
    """Tokens at the prompt's beginning that other chats will have too: the system prompt."""
    since: float = field(default_factory=time.monotonic)
    made: int = 0
    cancelled: bool = False
    random: torch.Generator | None = field(default=None, repr=False)


class Lane:
    """One base model and its running batch."""

    def __init__(self, model: str, dtype: str = "float32", revision: str | None = None) -> None:
        """Loads the model. Raises ModelUnavailable."""
        self.tokenizer: Any = models.load_tokenizer(model, revision)
        self.model: Any = models.load_model(model, dtype, revision)
        self.context = models.context_length(self.model)
        self.ends = set(models.end_ids(self.tokenizer))
        self.adapters = Adapters(self.model)
        self.waiting: deque[Chat] = deque()
        self.patient: deque[Chat] = deque()
        self.rows: list[Chat] = []
        self.joining: list[Chat] = []
        self.cache = Rows(self.model.device)
        self.prefixes = Prefixes()
        self.beginning = lru_cache(maxsize=256)(self._beginning)
        self.last = torch.zeros((0,), dtype=torch.long, device=self.model.device)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Puts a LoRA adapter on the base model; its name is never used again for another. Raises ModelUnavailable."""
        self.adapters.load(name, folder)

    def has(self, adapter: str) -> bool:
        """Whether chats may ask for this adapter."""
        return adapter == NO_ADAPTER or adapter in self.adapters.numbers

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
        self.joining = self._joining()
        begun = [(chat, self.prefixes.find(chat.adapter, chat.prompt[: chat.shared])) for chat in self.joining]
        for group in ([one for one in begun if not one[1]], [one for one in begun if one[1]]):
            if group:
                self._prefill(*zip(*group, strict=True))

    def fail(self, reason: str) -> None:
        """Ends every chat with an error; the lane is empty afterwards."""
        for chat in [*self.rows, *self.joining, *self.waiting, *self.patient]:
            chat.deliver(None, reason)
        self.joining = []
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

    def _beginning(self, system: tuple[tuple[str, str], ...]) -> list[int]:
        """The tokens with which every chat begins that has these system messages (role, text)."""
        head = [{"role": role, "content": text} for role, text in system]
        one, other = (
            models.encode_prompt(self.tokenizer, [*head, {"role": "user", "content": text}], self.context)[0] for text in "aB"
        )
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        return [token for token, _ in same]

    def shared(self, prompt: list[int], messages: Sequence[Mapping[str, str]]) -> int:
        """How many tokens of a prompt are the beginning of all chats with the same system messages."""
        system = tuple(
            (m["role"], m["content"]) for m in itertools.takewhile(lambda m: m["role"] in ("system", "developer"), messages)
        )
        start = self.beginning(system)
        return len(start) if prompt[: len(start)] == start and len(start) < len(prompt) else 0

    def _prefill(self, chats: Sequence[Chat], begun: Sequence[Layers]) -> None:
        """The prompts of new chats in one pass, then into the running batch. `begun` is what is known of their beginnings, of
        all of them or of none; prompts and beginnings are left-padded each."""
        device, pad = self.model.device, int(self.tokenizer.pad_token_id)
        known = [chat.shared if layers else 0 for chat, layers in zip(chats, begun, strict=True)]
        rest = [chat.prompt[start:] for chat, start in zip(chats, known, strict=True)]
        most, width = max(known), max(map(len, rest))
        ids = torch.tensor([[pad] * (width - len(one)) + one for one in rest], device=device)
        mask = torch.tensor(
            [
                [0] * (most - start) + [1] * start + [0] * (width - len(one)) + [1] * len(one)
                for one, start in zip(rest, known, strict=True)
            ],
            device=device,
        )
        cache = DynamicCache()
        for n in range(len(begun[0])):
            keys, values = (torch.cat([_padded(layers[n][m], most) for layers in begun]) for m in (0, 1))
            cache.update(keys, values, n)
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0)[:, most:], cache, chats)
        layers: Any = cache.layers
        made: Layers = [(layer.keys, layer.values) for layer in layers]
        for n, chat in enumerate(chats):
            if known[n]:
                _close_up(made, n, most - known[n], most, width - len(rest[n]))
            elif chat.shared:
                columns = slice(width - len(chat.prompt), width - len(chat.prompt) + chat.shared)
                start = [(keys[n : n + 1, :, columns], values[n : n + 1, :, columns]) for keys, values in made]
                self.prefixes.keep(chat.adapter, chat.prompt[: chat.shared], start)
        self.cache.join(made, [len(chat.prompt) for chat in chats])
        self.rows += chats
        self.joining = [chat for chat in self.joining if chat not in chats]
        self.last = torch.cat([self.last, self._choose(logits, chats)])
        self._deliver(len(self.rows) - len(chats))

    def _decode(self) -> None:
        cache, mask, positions = self.cache.step()
        self.last = self._choose(self._forward(self.last[:, None], mask, positions, cache, self.rows), self.rows)
        self._deliver(0)

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache, chats: Sequence[Chat]
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

    def _choose(self, logits: torch.Tensor, chats: Sequence[Chat]) -> torch.Tensor:
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


def _padded(one: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros on the left up to `width` tokens, [rows, heads, tokens, d]."""
    return torch.nn.functional.pad(one, (0, 0, width - one.shape[2], 0))


def _close_up(layers: Layers, row: int, start: int, end: int, gap: int) -> None:
    """Moves the columns from `start` to `end` of a row to the right by `gap`, so that its beginning meets the rest."""
    if gap:
        for pair in layers:
            for one in pair:
                one[row, :, start + gap : end + gap] = one[row, :, start:end].clone()
