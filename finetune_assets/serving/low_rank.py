"""LoRA adapters of many tenants in one batch: each row has its own matrices, two batched products a layer (Punica, 2023).

The base model stays as it is; a hook on each adapted layer adds x A B to what the layer gives. PEFT's own mixed batches go
through the adapters one after the other.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights

from finetune_assets.worker import models

PREFIX = "base_model.model."
PARTS = re.compile(r"(?P<layer>.+)\.lora_(?P<which>[AB])\.weight")
Pair = tuple[torch.Tensor, torch.Tensor]


class _Layer:
    """The stacked matrices of one layer, [adapters, in, rank] and [adapters, rank, out], and those of the present rows."""

    def __init__(self, module: Any) -> None:
        self.pairs: dict[int, Pair] = {}
        self.stacked: Pair | None = None
        self.now: Pair | None = None
        module.register_forward_hook(self.add)

    def put(self, adapter: int, pair: Pair, count: int) -> None:
        """Stacks one more adapter; zeros where another has no matrices here, or a smaller rank."""
        self.pairs[adapter] = pair
        rank = max(a.shape[1] for a, _ in self.pairs.values())
        down = pair[0].new_zeros((count, pair[0].shape[0], rank))
        up = pair[1].new_zeros((count, rank, pair[1].shape[1]))
        for n, (a, b) in self.pairs.items():
            down[n, :, : a.shape[1]], up[n, : b.shape[0]] = a, b
        self.stacked = (down, up)

    def choose(self, rows: torch.Tensor | None) -> None:
        """Takes the matrices of these rows."""
        if rows is None or self.stacked is None:
            self.now = None
            return
        known = self.stacked[0].shape[0]
        rows = torch.where(rows < known, rows, 0)  # an adapter that came later has no matrices in this layer
        self.now = (self.stacked[0].index_select(0, rows), self.stacked[1].index_select(0, rows))

    def add(self, _: Any, inputs: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor:
        """What the layer gives, and what the rows' adapters add to it."""
        if self.now is None:
            return made
        down, up = self.now
        return torch.baddbmm(made, torch.bmm(inputs[0], down.to(made.dtype)), up.to(made.dtype))


class Adapters:
    """Adapters on one model. Adapter 0 is none."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers: dict[str, _Layer] = {}
        self.numbers: dict[str, int] = {}
        self.chosen: list[int] = []

    def load(self, name: str, folder: Path) -> None:
        """Reads an adapter that `is_plain`. Raises ModelUnavailable where it does not fit the model; then nothing has changed."""
        if name in self.numbers:
            return
        try:
            pairs = self._read(folder)
        except Exception as error:
            raise models.unavailable(str(folder), error) from error
        number = len(self.numbers) + 1
        for layer, pair in pairs.items():
            if layer not in self.layers:
                self.layers[layer] = _Layer(self.model.get_submodule(layer))
            self.layers[layer].put(number, pair, number + 1)
        self.numbers[name] = number
        self.chosen = []

    def choose(self, names: Sequence[str]) -> None:
        """The rows of the next passes. Raises KeyError for an adapter that was not loaded."""
        if not self.numbers and not any(names):
            return
        rows = [self.numbers[name] if name else 0 for name in names]
        if rows == self.chosen:
            return
        index = torch.tensor(rows, device=self.model.device) if any(rows) else None
        for layer in self.layers.values():
            layer.choose(index)
        self.chosen = rows

    def _read(self, folder: Path) -> dict[str, Pair]:
        """Each layer's matrices, [in, rank] and [rank, out], the second scaled."""
        config: Any = PeftConfig.from_pretrained(str(folder))
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_peft_weights(str(folder), device=str(self.model.device)).items():
            part = PARTS.fullmatch(key.removeprefix(PREFIX))
            if part is None:
                raise ValueError(f"{key} is no matrix of a LoRA adapter")
            found.setdefault(part["layer"], {})[part["which"]] = value.T
        pairs: dict[str, Pair] = {}
        for layer, both in found.items():
            rank = both["A"].shape[1]
            alpha = next((v for k, v in (config.alpha_pattern or {}).items() if _names(k, layer)), config.lora_alpha)
            scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            weight: torch.Tensor = self.model.get_submodule(layer).weight
            sizes = {both["A"].shape[0], both["B"].shape[1]}
            if sizes != set(weight.shape):
                raise ValueError(f"{layer} is {tuple(weight.shape)} in the base model, the adapter's matrices are for {sizes}")
            pairs[layer] = (both["A"].contiguous(), (both["B"] * scale).contiguous())
        if not pairs:
            raise ValueError("there are no LoRA matrices in it")
        return pairs


def is_plain(folder: Path) -> bool:
    """Whether an adapter is low-rank matrices beside linear layers and nothing else: no DoRA, biases, or whole layers."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    extras = ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
    return (
        str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"
        and config.bias == "none"
        and not getattr(config, "lora_bias", False)
        and not any(getattr(config, name, None) for name in extras)
    )


def _names(pattern: str, layer: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None
