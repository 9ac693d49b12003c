"""Training rows: messages to token ids and labels, in an order that depends on the seed and the epoch only."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from finetune_assets.worker.models import encode_example
from finetune_assets.worker.progress import Progress

IGNORED = -100
"""Label of a token that is no target (torch.nn.CrossEntropyLoss)."""

MEGABATCH = 50
"""Batches among which examples are sorted by length."""


@dataclass(frozen=True)
class Rows:
    """Tokenised examples and what became of those that were too long."""

    examples: list[dict[str, list[int]]]
    """input_ids and labels."""
    shortened: int
    """Rows that lost turns, or the beginning of their prompt, to fit."""
    dropped: int
    """Rows whose reply leaves no room for a prompt."""

    @property
    def tokens(self) -> int:
        """All tokens, prompts included."""
        return sum(len(example["input_ids"]) for example in self.examples)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example["input_ids"]) for example in self.examples]

    def dataset(self) -> Dataset:
        """What TRL takes."""
        return Dataset.from_list(self.examples)


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: Progress) -> Rows:
    """Rows of a JSONL file of `messages`; only the last reply and its end token are targets. A missing file has no rows."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    examples: list[dict[str, list[int]]] = []
    shortened = dropped = 0
    for number, line in enumerate(lines, start=1):
        messages: list[dict[str, str]] = json.loads(line)["messages"]
        ids, mask, turns = encode_example(tokenizer, messages, max_length)
        if len(ids) > max_length:
            dropped += 1
            continue
        shortened += turns > 0 or len(ids) == max_length
        labels = [token if target else IGNORED for token, target in zip(ids, mask, strict=True)]
        examples.append({"input_ids": ids, "labels": labels})
        if number % 500 == 0 or number == len(lines):
            progress.update(f"tokenise {path.name}", number, len(lines))
    return Rows(examples, shortened, dropped)


class LengthGrouped(Sampler[int]):
    """Examples of similar length share a batch; batches come in random order. The same for a seed and an epoch, always.

    transformers' own `group_by_length` draws from the global random state, so a resumed run would see another order, and it
    goes from long to short inside every megabatch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        """`lengths`: tokens of each example."""
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
        # Only the last batch can be short. It stays last: the trainer cuts the stream into batches of equal size.
        short = [batches.pop()] if batches and len(batches[-1]) < self._batch_size else []
        chance.shuffle(batches)
        yield from (index for batch in batches + short for index in batch)


def longest_first(rows: Rows) -> list[dict[str, Any]]:
    """Evaluation order: little padding, and the largest batch first."""
    return sorted(rows.examples, key=lambda example: len(example["input_ids"]), reverse=True)
