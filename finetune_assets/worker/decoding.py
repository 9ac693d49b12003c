"""Greedy decoding and likelihoods of one batch, of causal language models of transformers.

What the prompts of a batch begin with (system message, examples) is computed once, whole rows are then padded on the left; logits
are made for the last positions only; rows that have ended leave the batch; keys and values are written into room that is there
already, since `DynamicLayer` copies all of them at every token. Models with another kind of attention than the full one, or
without `position_ids`, go through `generate`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LEAVE = 0.75
"""Rows leave the batch when so many of it, or fewer, go on: every leaving copies the cache."""
Ids = list[int]


class Room(DynamicLayer):
    """A layer's keys and values, [rows, heads, tokens, size], with room for `room` more tokens."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Puts new keys and values behind those that are there; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, rows = self.get_seq_length(), key_states.shape[0]
        end = start + key_states.shape[-2]
        if self._held is None or self._held[0].shape[0] != rows or self._held[0].shape[-2] < end:
            self._held = (self._grown(self.keys, key_states, end), self._grown(self.values, value_states, end))
        keys, values = self._held
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _grown(self, old: Any, new: torch.Tensor, end: int) -> torch.Tensor:
        made = new.new_empty(*new.shape[:2], end + self.room, new.shape[-1])
        if old.numel():
            made[:, :, : old.shape[-2]] = old
        return made


@dataclass
class Started:
    """A batch whose prompts are computed."""

    logits: torch.Tensor
    """[rows, keep, vocabulary], of the last `keep` positions."""
    cache: Any
    mask: torch.Tensor
    """[rows, tokens]."""


def is_plain(model: Any) -> bool:
    """Whether every layer sees all tokens, and takes their positions as they are given."""
    layers = DynamicCache(config=model.config).layers
    return "position_ids" in _takes(model) and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def start(model: Any, rows: Sequence[Ids], pad: int, keep: int, most_shared: int, room: int = 0) -> Started:
    """Computes the rows; at most `most_shared` tokens of what they begin with in one go, `room` more tokens may follow."""
    plain, takes = is_plain(model), _takes(model)
    shared = min(_common(rows), most_shared) if plain and len(rows) > 1 else 0
    rest = [row[shared:] for row in rows]
    width = max(map(len, rest))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rest], device=model.device)
    there = [[1] * shared + [0] * (width - len(row)) + [1] * len(row) for row in rest]
    mask = torch.tensor(there, device=model.device)
    asked: dict[str, Any] = {"use_cache": False}
    cache = None
    if plain:
        cache = DynamicCache(config=model.config)
        cache.layers[:] = [Room(room) for _ in cache.layers]
        asked = {"use_cache": True, "past_key_values": cache}
    if shared:
        first = torch.tensor([rows[0][:shared]], device=model.device)
        model(input_ids=first, **asked, **_only(takes, logits_to_keep=1))
        asked["past_key_values"].batch_repeat_interleave(len(rows))
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    made = model(input_ids=ids, attention_mask=mask, **asked, **_only(takes, logits_to_keep=keep, position_ids=positions))
    return Started(made.logits[:, -keep:], cache, mask)


def greedy(model: Any, prompts: Sequence[Ids], most: int, ends: set[int], pad: int) -> list[list[int]]:
    """At most `most` likeliest ids after each prompt, the end token with them."""
    if not is_plain(model):
        return _generate(model, prompts, most, pad)
    batch = start(model, prompts, pad, 1, min(map(len, prompts)) - 1, most)
    made: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    done: set[int] = set()
    length = torch.tensor([[len(prompt)] for prompt in prompts], device=model.device)
    logits, mask = batch.logits, batch.mask
    for step in range(most):
        token = logits[:, -1].argmax(-1)
        for row, one in zip(going, token.tolist(), strict=True):
            if row not in done:
                made[row].append(one)
                done |= {row} if one in ends else set()
        staying = [place for place, row in enumerate(going) if row not in done]
        if not staying or step + 1 == most:
            break
        if len(staying) <= LEAVE * len(going):
            going, chosen = [going[place] for place in staying], torch.tensor(staying, device=model.device)
            token, mask, length = token[chosen], mask[chosen], length[chosen]
            batch.cache.batch_select_indices(chosen)
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        asked = {"position_ids": length + step, "past_key_values": batch.cache, "use_cache": True}
        logits = model(input_ids=token[:, None], attention_mask=mask, **asked).logits
    return made


def likelihoods(model: Any, examples: Sequence[tuple[Ids, Ids]], pad: int) -> list[float]:
    """Negative log-likelihood in nats of the targets (mask 1, never the first token) of (ids, mask) each."""
    first = [mask.index(1) if 1 in mask else len(mask) - 1 for _, mask in examples]
    keep = max(len(ids) - n for (ids, _), n in zip(examples, first, strict=True))
    logits = start(model, [ids[:-1] for ids, _ in examples], pad, keep, min(first) - 1).logits.float()
    wanted = torch.tensor([_last(ids, keep, pad) for ids, _ in examples], device=model.device)
    target = torch.tensor([_last(mask, keep, 0) for _, mask in examples], device=model.device)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    return (losses.double() * target).sum(dim=1).tolist()


def _common(rows: Sequence[Ids]) -> int:
    """How many tokens all rows begin with: as many as the first and the last of them in order do."""
    low, high = min(rows), max(rows)
    return next((n for n, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), min(len(low), len(high)))


def _last(row: Ids, count: int, fill: int) -> list[int]:
    return [fill] * (count - len(row)) + row[-count:]


def _generate(model: Any, prompts: Sequence[Ids], most: int, pad: int) -> list[list[int]]:
    """As transformers does it; what follows an end token is padding."""
    width = max(map(len, prompts))
    ids = torch.tensor([_last(prompt, width, pad) for prompt in prompts], device=model.device)
    mask = torch.tensor([_last([1] * len(prompt), width, 0) for prompt in prompts], device=model.device)
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most)[:, width:].tolist()


def _takes(model: Any) -> Collection[str]:
    return inspect.signature(model.forward).parameters


def _only(takes: Collection[str], **values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in takes}
