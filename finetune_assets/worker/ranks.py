"""Several processes of one training: each computes a part of every step's rows, one of them, the first, writes.

Started by torch's elastic launcher, as `accelerate launch` does (RANK, WORLD_SIZE, … in the environment): the worker starts it
itself where its spec asks for several `processes` or `nodes`. The run's machine is node 0; on each other one the same spec is
started by hand, from the shared disk:

    FINETUNE_NODE=1 python -m finetune_assets.worker SPEC

Gradients are averaged by DistributedDataParallel, or weights, gradients and moments are divided (`worker.shards`); over NCCL on
GPUs and gloo on CPUs.
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


def here() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def become(spec: dict[str, Any], spec_file: Path) -> NoReturn:
    """Turns this process into the launcher of this machine's workers; its id stays."""
    nodes = int(spec.get("nodes") or 1)
    host, port = str(spec["rendezvous"]).rsplit(":", 1) if nodes > 1 else ("127.0.0.1", str(_free_port()))
    if os.environ.get("FINETUNE_DIE_WITH_PARENT", "0") != "0":
        os.environ["FINETUNE_DIE_WITH_PARENT"] = "1"  # the workers' parent is the launcher
    if host == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform.startswith("linux") else "lo0")
    place = ["--nnodes", str(nodes), "--node-rank", str(node()), "--nproc-per-node", str(spec.get("processes") or 1)]
    place += ["--master-addr", host, "--master-port", port]
    module = ["-m", "finetune_assets.worker", str(spec_file)]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *place, *module])


def node() -> int:
    """Number of this machine among those of the training; 0 is the one of the run."""
    return int(os.environ.get("FINETUNE_NODE") or 0)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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


def lost(error: BaseException) -> bool:
    """Whether an error means that another process of the training is gone: gloo says it in words, NCCL by torch's class."""
    said = any(text in str(error) for text in ("closed by peer", "reset by peer", "NCCL"))
    return count() > 1 and (said or type(error).__name__.startswith("Dist"))


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
