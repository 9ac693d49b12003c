"""What a checkpoint holds, taken from a training in memory and written while the training goes on.

weights.safetensors   the weights that are trained, by name, float32
optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json   what transformers' Trainer reads when it resumes
totals.json           our own sums
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune_assets.storage import write_json
from finetune_assets.training.machine import available_memory
from finetune_assets.worker import memory, shards

WEIGHTS = "weights.safetensors"
ROOM = 2.0
"""Free memory, in sizes of what is copied, below which nothing is copied."""


@dataclass(frozen=True)
class Snapshot:
    """A training at one step."""

    weights: dict[str, torch.Tensor]
    optimizer: Any
    scheduler: Any
    chance: dict[str, Any]
    """States of the random number generators."""
    state: dict[str, Any]
    """transformers' TrainerState."""
    totals: dict[str, Any]

    @classmethod
    def of(cls, loop: Any, totals: Any) -> Snapshot:
        """The state of a loop, not copied; of a sharded one a copy, whole, in the first process. `totals`: a dataclass."""
        chance = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            chance["cuda"] = torch.cuda.random.get_rng_state()
        trained = {name: weight.detach() for name, weight in loop.model.named_parameters() if weight.requires_grad}
        schedule = loop.lr_scheduler.state_dict()
        moments = loop.optimizer.state_dict()
        if loop.is_fsdp_enabled:
            trained, moments = shards.whole((trained, moments))
        return cls(trained, moments, schedule, chance, asdict(loop.state), asdict(totals))

    @property
    def size(self) -> int:
        """Bytes of weights and moments."""
        return sum(part.nbytes for part in tree_leaves((self.weights, self.optimizer)) if isinstance(part, torch.Tensor))

    def copied(self) -> Snapshot | None:
        """A copy in main memory, which the training does not change; None where there is no room for one."""
        free = available_memory()
        if free is not None and free < ROOM * self.size:
            return None
        try:
            weights, optimizer = tree_map_only(
                torch.Tensor, lambda part: part.detach().to("cpu", copy=True), (self.weights, self.optimizer)
            )
        except Exception as error:
            if not memory.ran_out(error):
                raise
            return None
        return Snapshot(weights, optimizer, self.scheduler, self.chance, self.state, self.totals)

    def write(self, folder: Path) -> None:
        """Into a folder that is there."""
        save_file({name: weight.contiguous().cpu() for name, weight in self.weights.items()}, folder / WEIGHTS)
        torch.save(self.optimizer, folder / "optimizer.pt")
        torch.save(self.scheduler, folder / "scheduler.pt")
        torch.save(self.chance, folder / "rng_state.pth")
        (folder / "trainer_state.json").write_text(json.dumps(self.state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        write_json(folder / "totals.json", self.totals)


def load_weights(model: Any, folder: Path) -> None:
    """Puts a checkpoint's weights into the model that they were taken from."""
    found = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(shards.like(weight, found[name]))
