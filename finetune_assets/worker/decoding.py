"""Greedy decoding and likelihoods of one batch, of causal language models of transformers.

What the prompts of a batch begin with (system message, examples) is computed once, whole rows are then padded on the left; logits
are made for the last positions only; rows that have ended leave the batch; keys and values are written into room that is there
already, since `DynamicLayer` copies all of them at every token. A prompt whose reply and whose reference are both wanted is
computed once for the two. Models with another kind of attention than the full one, or
without `position_ids`, go through `generate`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LOGITS = 2**26  # numbers in the logits of a batch: 256 MB in float32
TOGETHER = 1024
"""Padded tokens of prompts that a CPU computes in one go: with those of 32 long prompts its caches overflow (half as fast)."""
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

    def back(self, tokens: int) -> None:
        """Forgets all but the first `tokens`; their room stays."""
        keys, values = cast("tuple[torch.Tensor, torch.Tensor]", (self.keys, self.values))
        self.keys, self.values = keys[:, :, :tokens], values[:, :, :tokens]

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
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    if not plain:
        asked = {"use_cache": False, **_only(takes, logits_to_keep=keep, position_ids=positions)}
        return Started(model(input_ids=ids, attention_mask=mask, **asked).logits[:, -keep:], None, mask)
    groups = _groups([len(row) for row in rest], TOGETHER if model.device.type == "cpu" else len(rest) * width)
    parts: list[Any] = []
    logits: list[torch.Tensor] = []
    begun = _empty(model, 0)
    if shared:
        first = torch.tensor([rows[0][:shared]], device=model.device)
        model(input_ids=first, use_cache=True, past_key_values=begun, **_only(takes, logits_to_keep=1))
    for group in groups:
        longest = max(len(row) for row in rest[group])
        cache = _empty(model, room if len(groups) == 1 else 0)
        for layer, held in zip(cache.layers, begun.layers if shared else (), strict=False):
            layer.update(*(part.expand(group.stop - group.start, -1, -1, -1) for part in (held.keys, held.values)))
        seen = torch.cat([mask[group, :shared], mask[group, -longest:]], 1)
        asked = {"attention_mask": seen, "position_ids": positions[group, -longest:], "past_key_values": cache, "use_cache": True}
        made = model(input_ids=ids[group, -longest:], **asked, **_only(takes, logits_to_keep=keep)).logits[:, -keep:]
        logits.append(torch.nn.functional.pad(made, (0, 0, keep - made.shape[1], 0)))
        parts.append(cache)
    return Started(torch.cat(logits), parts[0] if len(parts) == 1 else _joined(model, parts, shared, width, room), mask)


def _groups(lengths: Sequence[int], most: int) -> list[slice]:
    """Neighbouring rows that are computed together: at most `most` padded tokens, one row at least."""
    made: list[slice] = []
    begin = longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > begin and (row + 1 - begin) * longest > most:
            made.append(slice(begin, row))
            begin, longest = row, length
    return [*made, slice(begin, len(lengths))]


def _empty(model: Any, room: int) -> Any:
    cache = DynamicCache(config=model.config)
    cache.layers[:] = [Room(room) for _ in cache.layers]
    return cache


def _joined(model: Any, parts: Sequence[Any], shared: int, width: int, room: int) -> Any:
    """One cache of all rows: `shared` tokens, then each part's, padded on the left to `width`."""
    cache = _empty(model, room)
    for number, layer in enumerate(cache.layers):
        layers = [part.layers[number] for part in parts]
        layer.update(*(_padded([getattr(one, kind) for one in layers], shared, shared + width) for kind in ("keys", "values")))
    return cache


def _padded(parts: Sequence[torch.Tensor], shared: int, width: int) -> torch.Tensor:
    rows, first = sum(part.shape[0] for part in parts), parts[0]
    made, row = first.new_zeros(rows, first.shape[1], width, first.shape[3]), 0
    for part in parts:
        into, tokens = made[row : row + part.shape[0]], part.shape[2] - shared
        into[:, :, :shared], into[:, :, width - tokens :] = part[:, :, :shared], part[:, :, shared:]
        row += part.shape[0]
    return made


def greedy(model: Any, prompts: Sequence[Ids], most: int, ends: set[int], pad: int) -> list[list[int]]:
    """At most `most` likeliest ids after each prompt, the end token with them."""
    if not is_plain(model):
        return _generate(model, prompts, most, pad)
    return _go_on(model, _prompted(model, prompts, pad, most), [len(prompt) for prompt in prompts], most, ends)


def answered(
    model: Any, prompts: Sequence[Ids], references: Sequence[tuple[Ids, Ids]], most: int, ends: set[int], pad: int
) -> tuple[list[list[int]], list[float]]:
    """`greedy`, and the `likelihoods` of what else could follow each prompt: (ids, mask), both empty where nothing is asked."""
    if not is_plain(model):
        whole = [([*p, *ids], [0] * len(p) + mask) for p, (ids, mask) in zip(prompts, references, strict=True)]
        size = max(1, LOGITS // (model.config.get_text_config().vocab_size * max(len(ids) for ids, _ in whole)))
        nats = [one for n in range(0, len(whole), size) for one in likelihoods(model, whole[n : n + size], pad)]
        return _generate(model, prompts, most, pad), nats
    lengths = [len(prompt) for prompt in prompts]
    batch = _prompted(model, prompts, pad, max(most, *(len(ids) for ids, _ in references)))
    nats = _following(model, batch, lengths, references, pad)
    return _go_on(model, batch, lengths, most, ends), nats


def _prompted(model: Any, prompts: Sequence[Ids], pad: int, room: int) -> Started:
    return start(model, prompts, pad, 1, min(map(len, prompts)) - 1, room)


def _go_on(model: Any, batch: Started, lengths: Sequence[int], most: int, ends: set[int]) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in lengths]
    going = list(range(len(lengths)))
    done: set[int] = set()
    length = torch.tensor(lengths, device=model.device)[:, None]
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


def _following(
    model: Any, batch: Started, lengths: Sequence[int], references: Sequence[tuple[Ids, Ids]], pad: int
) -> list[float]:
    """Nats of the references after the computed prompts, which are left as they were. So many tokens go at a time that their
    logits stay within LOGITS numbers."""
    width = max(len(ids) for ids, _ in references)
    total = torch.zeros(len(lengths), dtype=torch.float64, device=model.device)
    if width == 0:
        return total.tolist()
    wanted = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in references], device=model.device)
    there = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in references], device=model.device)
    target = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in references], device=model.device)
    positions = (torch.tensor(lengths, device=model.device)[:, None] + torch.arange(width, device=model.device)) * there
    step = max(1, LOGITS // (len(lengths) * batch.logits.shape[-1]))
    logits, at = batch.logits, 0
    while True:
        foretold = slice(at, at + logits.shape[1])
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), wanted[:, foretold], reduction="none")
        total += (losses.double() * target[:, foretold]).sum(dim=1)
        at = foretold.stop
        if at == width:
            break
        given = slice(at - 1, min(at - 1 + step, width - 1))
        mask = torch.cat([batch.mask, batch.mask.new_ones(len(lengths), given.stop)], 1)
        asked = {"position_ids": positions[:, given], "past_key_values": batch.cache, "use_cache": True}
        logits = model(input_ids=wanted[:, given], attention_mask=mask, **asked).logits
    for layer in batch.cache.layers:
        layer.back(batch.mask.shape[1])
    return total.tolist()


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
