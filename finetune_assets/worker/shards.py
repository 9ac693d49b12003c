"""Weights, gradients and moments divided among the processes of one training: FSDP2 (torch's `fully_shard`, by accelerate).

A checkpoint holds whole tensors, as that of one process does, so a training goes on with any number of processes, sharded or not.
Every process calls these functions: a tensor is put together from all of them.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from finetune_assets.worker import ranks


def settings(recompute: bool) -> dict[str, Any]:
    """What transformers' TrainingArguments need for it; `recompute`: activations are computed again in the backward pass."""
    config = {"version": 2, "reshard_after_forward": True, "activation_checkpointing": recompute}
    return {"fsdp": True, "fsdp_config": config, "activation_checkpointing": False}


def enable(loop: Any) -> None:
    """Sees to it that accelerate divides a loop's model: on CPUs it leaves the wish aside, and every process holds the whole."""
    if loop.is_fsdp_enabled:
        return
    plugin = FullyShardedDataParallelPlugin(**loop.args.fsdp_plugin_args)
    state = loop.accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    loop.is_fsdp_enabled = True


def whole(tree: Any) -> Any:
    """A copy of the tree whose tensors are whole, in the first process's main memory; empty in the others."""
    return tree_map_only(torch.Tensor, _whole, tree)


def _whole(part: torch.Tensor) -> torch.Tensor:
    # Some are whole for a while: between a forward pass and the next step the first and last layers stay put together.
    tensor = part.full_tensor() if isinstance(part, DTensor) else part.detach().clone()
    return tensor.to("cpu") if ranks.first() else tensor.new_empty(0)


def like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor that belongs to `parameter`; the tensor itself where that is not sharded."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether they hold neither NaN nor infinity, in all processes; each looks at its own part."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    bad = sum((~torch.isfinite(part.detach()).all() for part in parts), start=torch.tensor(0, device=parts[0].device))
    return ranks.summed([float(bad)])[0] == 0


def trained(model: Any) -> dict[str, torch.Tensor] | None:
    """What `save_pretrained` writes of a sharded model, by name; None where the process holds it whole anyway."""
    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        return None
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    return whole({name: weight for name, weight in model.state_dict().items() if name not in frozen})


def load_optimizer(loop: Any, checkpoint: Path) -> None:
    """The moments and the schedule of a checkpoint, into a loop whose model is sharded."""
    held = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
    held["state"] = {
        at: {name: like(parameters[at], value) if torch.is_tensor(value) else value for name, value in state.items()}
        for at, state in held["state"].items()
    }
    loop.optimizer.load_state_dict(held)
    loop.lr_scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))
