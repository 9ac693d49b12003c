"""The order of the training rows: it depends on the seed and the epoch only, never on the micro-batch or on an interruption."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from finetune_assets.training.tokens import IGNORED, Row, Rows

MEGABATCH = 50
"""Batches among which examples are sorted by length."""


class LengthGrouped(Sampler[int]):
    """Examples of similar length share a batch; batches come in random order. The same for a seed and an epoch, always.

    transformers' own `group_by_length` draws from the global random state, so a resumed run would see another order, and it
    goes from long to short inside every megabatch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        """`lengths`: tokens of each example; `batch_size`: examples of an optimiser step."""
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed}:{self._epoch}")
        order = list(range(len(self._lengths)))
        chance.shuffle(order)
        size = self._batch_size * MEGABATCH
        batches: list[list[int]] = []
        for start in range(0, len(order), size):
            mega = sorted(order[start : start + size], key=lambda index: self._lengths[index], reverse=True)
            batches.extend(mega[at : at + self._batch_size] for at in range(0, len(mega), self._batch_size))
        yield from _shuffled(batches, self._batch_size, chance)


class FixedBatches(Sampler[int]):
    """The same batches in every epoch, in another order: for KTO, which pairs each prompt with a neighbour's completion."""

    def __init__(self, rows: int, batch_size: int, seed: int):
        """`rows` stand in batches of `batch_size` already."""
        self._rows, self._batch_size, self._seed, self._epoch = rows, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        indices = list(range(self._rows))
        batches = [indices[at : at + self._batch_size] for at in range(0, self._rows, self._batch_size)]
        yield from _shuffled(batches, self._batch_size, random.Random(f"{self._seed}:{self._epoch}"))


class Filled(Sampler[int]):
    """The rows of another order, each batch whole: the last one is filled with the row after the last, which has no targets."""

    def __init__(self, order: LengthGrouped | FixedBatches, batch_size: int):
        """`batch_size`: examples of an optimiser step."""
        self._order, self._missing = order, -len(order) % batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._order) + self._missing

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from [len(self._order)] * self._missing


def no_targets(tokenizer: PreTrainedTokenizerBase) -> Row:
    """The shortest row from which nothing is learnt."""
    end = int(cast("Any", tokenizer.eos_token_id))
    return {"input_ids": [end, end], "labels": [IGNORED, IGNORED]}


def _shuffled(batches: list[list[int]], size: int, chance: random.Random) -> Iterator[int]:
    """Only the last batch can be short. It stays last: the trainer cuts the stream into batches of equal size."""
    short = [batches.pop()] if batches and len(batches[-1]) < size else []
    chance.shuffle(batches)
    for batch in batches + short:
        yield from batch


def longest_first(rows: Rows) -> list[Row]:
    """Evaluation order: little padding, and the largest batch first."""
    order = sorted(range(len(rows.examples)), key=rows.lengths.__getitem__, reverse=True)
    return [rows.examples[index] for index in order]
