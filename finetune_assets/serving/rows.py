"""Keys and values of the chats of a running batch, kept in place: a step writes one column, nothing is copied.

All rows end in the same column, so shorter ones begin later and the mask hides what is before them. A row that joins is written
once; one that leaves is overwritten by the last. The buffers grow by `SPARE` columns at a time.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

SPARE = 128
Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, [rows, heads, tokens, d]."""


class Rows:
    """The rows of one batch. `starts` is each row's first column, `end` the column after the newest tokens."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.layers: Layers = []
        self.mask = torch.zeros((0, 0), dtype=torch.long, device=device)
        self.starts: list[int] = []
        self.end = 0

    @property
    def first(self) -> int:
        """First column that any row uses."""
        return min(self.starts, default=self.end)

    def join(self, made: Layers, lengths: Sequence[int]) -> None:
        """Takes rows in, of which `made` holds the keys and values of their last `lengths` tokens, right-aligned."""
        old, new, width = len(self.starts), len(self.starts) + len(lengths), max(lengths)
        if not old:
            self.end = width
        shift = max(0, width - self.end)
        if not self.layers or new > self.mask.shape[0] or self.end + shift >= self.mask.shape[1]:
            self._make(made, max(new, min(2 * self.mask.shape[0], 32)), shift - min(self.first, self.end - width + shift))
        elif shift:
            self._make(made, self.mask.shape[0], shift)
        for (keys, values), (k, v) in zip(self.layers, made, strict=True):
            for n, length in enumerate(lengths):
                keys[old + n, :, self.end - length : self.end] = k[n, :, k.shape[2] - length :]
                values[old + n, :, self.end - length : self.end] = v[n, :, v.shape[2] - length :]
        self.mask[old:new] = 0
        for n, length in enumerate(lengths):
            self.mask[old + n, self.end - length : self.end] = 1
        self.starts += [self.end - length for length in lengths]

    def leave(self, gone: set[int]) -> list[int]:
        """Takes rows out; the former places of those that stay, in their new order."""
        order = list(range(len(self.starts)))
        for place in sorted(gone, reverse=True):
            last = len(order) - 1
            if place != last:
                for keys, values in self.layers:
                    keys[place, :, self.starts[last] : self.end] = keys[last, :, self.starts[last] : self.end]
                    values[place, :, self.starts[last] : self.end] = values[last, :, self.starts[last] : self.end]
                self.mask[place] = self.mask[last]
                self.starts[place], order[place] = self.starts[last], order[last]
            order.pop()
            self.starts.pop()
        if not order:
            self.layers, self.end = [], 0
            self.mask = self.mask[:0, :0]
        return order

    def step(self) -> tuple[Cache, torch.Tensor, torch.Tensor]:
        """A cache to which a forward pass adds one token a row; its mask [rows, tokens] and positions [rows, 1]."""
        if self.end == self.mask.shape[1]:
            self._make(self.layers, self.mask.shape[0], -self.first)
        count, first = len(self.starts), self.first
        self.mask[:count, self.end] = 1
        self.end += 1
        positions = torch.tensor([[self.end - 1 - start] for start in self.starts], device=self.device)
        cache = Cache(layers=[_Column(layer, count, first, self.end) for layer in self.layers])
        return cache, self.mask[:count, first : self.end], positions

    def _make(self, like: Layers, rows: int, shift: int) -> None:
        """New buffers of at least SPARE free columns, with what there is moved by `shift` columns."""
        count, first, end = len(self.starts), self.first, self.end
        columns = end + shift + SPARE
        fresh: Layers = []
        for n, pair in enumerate(like):
            both: list[torch.Tensor] = []
            for m, one in enumerate(pair):
                made = torch.zeros((rows, one.shape[1], columns, one.shape[3]), dtype=one.dtype, device=one.device)
                if count:
                    made[:count, :, first + shift : end + shift] = self.layers[n][m][:count, :, first:end]
                both.append(made)
            fresh.append((both[0], both[1]))
        mask = torch.zeros((rows, columns), dtype=torch.long, device=self.device)
        if count:
            mask[:count, first + shift : end + shift] = self.mask[:count, first:end]
        self.layers, self.mask = fresh, mask
        self.starts = [start + shift for start in self.starts]
        self.end = end + shift


class _Column(CacheLayerMixin):
    """One layer during one step: what is new goes into the last column."""

    def __init__(self, layer: tuple[torch.Tensor, torch.Tensor], count: int, first: int, end: int) -> None:
        super().__init__()
        self.layer, self.count, self.first, self.end = layer, count, first, end
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to make."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens, the newest among them."""
        keys, values = self.layer
        keys[: self.count, :, self.end - 1] = key_states[:, :, 0]
        values[: self.count, :, self.end - 1] = value_states[:, :, 0]
        return keys[: self.count, :, self.first : self.end], values[: self.count, :, self.first : self.end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens with the new ones, and their offset."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the new ones."""
        return self.end - 1 - self.first

    def get_max_length(self) -> int:
        """None."""
        return -1
