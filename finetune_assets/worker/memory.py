"""How much memory there is, and running out of it as an error that can be caught instead of a process that is killed."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from finetune_assets.training.machine import available_memory

SPARED = 0.95
"""Share of the free memory that a training may take: the rest is the system's."""


@contextmanager
def limited() -> Generator[None]:
    """On a machine without GPU: what is allocated beyond the free memory fails, before the kernel kills somebody (RLIMIT_DATA).

    A limit that is stricter already stays.
    """
    room = None if torch.cuda.is_available() or not sys.platform.startswith("linux") else available_memory()
    if room is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _private_bytes() + int(SPARED * room)
    bounds = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *bounds]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _private_bytes() -> int:
    """What RLIMIT_DATA counts of this process (proc_pid_status(5), VmData)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData"):
            return int(line.split()[1]) * 1024
    return 0


def used() -> int:
    """Bytes that this process holds now: on the GPU where there is one, else in main memory (0 where the system does not say)."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    pages = Path("/proc/self/statm")  # proc_pid_statm(5)
    return int(pages.read_text(encoding="utf-8").split()[1]) * resource.getpagesize() if pages.exists() else 0


def release() -> None:
    """Gives what is no longer used back to the system, and to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        with suppress(AttributeError):  # musl has no malloc_trim(3)
            ctypes.CDLL(None).malloc_trim(0)


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out: on the GPU, or on the CPU by a limit."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    texts = ("can't allocate memory", "not enough memory", "cannot allocate memory", "std::bad_alloc", "out of memory")
    return isinstance(error, RuntimeError | OSError) and any(text in str(error).lower() for text in texts)


def in_short(error: BaseException) -> str:
    """That memory ran out, with the first line of what the error says."""
    said = str(error).strip().splitlines()
    return f"memory ran out ({(said[0] if said else type(error).__name__)[:120]})"
