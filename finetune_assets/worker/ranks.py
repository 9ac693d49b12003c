"""Several processes of one training: each computes a part of every step's rows, one of them, the first, writes.

Started by torch's elastic launcher, as `accelerate launch` does (RANK, WORLD_SIZE, … in the environment): the worker starts it
itself where its spec asks for several `processes`; on several machines each of them is started with

    python -m torch.distributed.run --nnodes N --nproc-per-node M --rdzv-endpoint HOST:29500 -m finetune_assets.worker SPEC

and the same SPEC on a shared disk. Gradients are averaged by DistributedDataParallel, over NCCL on GPUs and gloo on CPUs.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Value = TypeVar("Value")


class StartAgain(Exception):
    """This process cannot go on, the others wait for it in vain: all of them end, and start again from the checkpoint."""


def count() -> int:
    """Processes of this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def become(processes: int, spec_file: Path) -> NoReturn:
    """Turns this process into the launcher of `processes` workers on this machine; its id stays."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if os.environ.get("FINETUNE_DIE_WITH_PARENT", "0") != "0":
        os.environ["FINETUNE_DIE_WITH_PARENT"] = "1"  # the workers' parent is the launcher
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform.startswith("linux") else "lo0")
    place = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    module = ["-m", "finetune_assets.worker", str(spec_file)]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *place, *module])


def join() -> None:
    """Meets the other processes; nothing where there are none."""
    if count() > 1:
        import torch  # noqa: PLC0415 (whoever only asks for `first` needs none)
        from accelerate import PartialState  # noqa: PLC0415

        PartialState(cpu=not torch.cuda.is_available())


def same(value: Value) -> Value:
    """The first process's value, in every process."""
    if count() == 1:
        return value
    import torch.distributed as processes  # noqa: PLC0415

    held: list[Any] = [value]
    processes.broadcast_object_list(held, src=0)
    return held[0]


def wait() -> None:
    """Until all are here."""
    same(None)


def summed(numbers: list[float]) -> list[float]:
    """Sums over the processes."""
    if count() == 1:
        return numbers
    import torch  # noqa: PLC0415

    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(held)
    return held.tolist()
