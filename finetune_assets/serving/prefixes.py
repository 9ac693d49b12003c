"""Keys and values of the beginnings that chats share: an assistant's system prompt is computed once, not for every chat.

A beginning is known by its adapter and its very tokens, so what is found is what would have been computed. The one that was not
asked for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from finetune_assets.serving.rows import Layers

LEAST = 16
"""Tokens from which a beginning is worth keeping."""
MOST_BYTES = 256 << 20
"""Of all beginnings of one base model."""


class Prefixes:
    """The beginnings of one base model and its adapters."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[str, tuple[int, ...]], Layers] = OrderedDict()
        self.bytes = 0

    def find(self, adapter: str, ids: Sequence[int]) -> Layers:
        """Each layer's keys and values, [1, heads, tokens, d]; empty where this beginning is not known."""
        key = (adapter, tuple(ids))
        found = self.kept.get(key)
        if found is None:
            return []
        self.kept.move_to_end(key)
        return found

    def keep(self, adapter: str, ids: Sequence[int], layers: Layers) -> None:
        """Remembers a copy of them."""
        key = (adapter, tuple(ids))
        if key in self.kept or len(ids) < LEAST:
            return
        self.kept[key] = [(keys.clone(), values.clone()) for keys, values in layers]
        self.bytes += _bytes(layers)
        while self.bytes > MOST_BYTES:
            self.bytes -= _bytes(self.kept.popitem(last=False)[1])


def _bytes(layers: Layers) -> int:
    return sum(one.numel() * one.element_size() for pair in layers for one in pair)
