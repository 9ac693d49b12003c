"""Batches of a small model side by side, one thread each: its matrices are too small to be shared by several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def side_by_side(work: Callable[[Item], Made], items: Sequence[Item], *, small: bool = True) -> Iterator[tuple[Item, Made]]:
    """(item, what `work` made of it) in order; one after the other with all threads where the model is not `small`."""
    threads = torch.get_num_threads()
    wide = small and threads > 1 and len(items) > 1
    try:
        torch.set_num_threads(1 if wide else threads)
        with ThreadPoolExecutor(threads if wide else 1) as pool:
            yield from zip(items, pool.map(work, items), strict=True)
    finally:
        torch.set_num_threads(threads)
