"""What this machine has, without importing torch: cores, memory, GPU, the arithmetic of its processor."""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

MOST_THREADS = 8
BFLOAT16_FROM = 8.0
"""Compute capability from which NVIDIA's cards multiply bfloat16 (Ampere); those before emulate it, slower than float32."""

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def cores() -> int:
    """The cores this process may use: by its affinity, and by the time that its cgroup gives it (a container's `--cpus`)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, math.ceil(cpu_quota() or allowed)))


def cpu_quota() -> float | None:
    """Cores' worth of time that the cgroups of this process give it (v2: cpu.max; v1: cpu.cfs_quota_us); None: no limit."""
    found: list[float] = []
    for folder in _cgroups("cpu"):
        told = (
            _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        ).split()
        if len(told) == 2 and told[0].isdigit() and int(told[1]) > 0:  # `max`, -1: no limit
            found.append(int(told[0]) / int(told[1]))
    return min(found, default=None)


def default_threads() -> int:
    """As many as cores, at most 8. The worker's threads sleep while they wait, so a busy core costs little."""
    return min(cores(), MOST_THREADS)


def free_threads() -> int:
    """As many as the cores that other processes leave (by the load of the last minute), at least 1: a training that shares its
    cores takes more CPU time for the same work, and is no sooner done."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, min(default_threads(), round((os.cpu_count() or 1) - busy)))


def default_precision() -> str:
    """`bfloat16` where the GPU, or without one the CPU, multiplies it natively (twice as fast), else `float32`."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def multiplies_bfloat16() -> bool:
    """Whether the GPU (Ampere or later), or without one the processor (AVX512-BF16, AMX), has instructions for it."""
    if has_gpu():
        return all(card.capability >= BFLOAT16_FROM for card in cards())
    flags = _read(Path("/proc/cpuinfo"))
    return "avx512_bf16" in flags or "amx_bf16" in flags


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU."""
    return gpus() > 0


def gpus() -> int:
    """GPUs that the NVIDIA driver shows."""
    shown = Path("/proc/driver/nvidia/gpus")  # not in every container
    return len(list(shown.iterdir())) if shown.exists() else len(list(Path("/dev").glob("nvidia[0-9]*")))


@dataclass(frozen=True)
class Card:
    """A GPU."""

    memory: int
    """Bytes."""
    capability: float
    """Compute capability: 7.5 (Turing), 8.0 (Ampere), 9.0 (Hopper), …"""


@lru_cache(maxsize=1)
def cards() -> tuple[Card, ...]:
    """The GPUs as nvidia-smi tells them; none where it is not there, or does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.total,compute_cap", "--format=csv,noheader,nounits"]
    found: list[Card] = []
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    for line in told.splitlines():
        memory, _, capability = (part.strip() for part in line.partition(","))
        if memory.isdecimal() and capability.replace(".", "", 1).isdecimal():
            found.append(Card(int(memory) * 2**20, float(capability)))
    return tuple(found)


def room() -> int | None:
    """Bytes that a training process could ever have: of the largest GPU where there is one (None: it does not say), else of
    main memory."""
    return max((card.memory for card in cards()), default=None) if has_gpu() else total_memory()


def has_package(name: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(name) is not None


def total_memory() -> int:
    """Bytes that this process could ever have: of the machine, or of its cgroup where that is less."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([pages, *(limit for limit, _ in _memory_limits())])


def available_memory() -> int | None:
    """Bytes that can be allocated now without pushing anybody out; None where the system does not say."""
    told = _read(Path("/proc/meminfo")).splitlines()
    free = [int(line.split()[1]) * 1024 for line in told if line.startswith("MemAvailable")]
    return min([*free, *(limit - used for limit, used in _memory_limits())], default=None)


def _memory_limits() -> list[tuple[int, int]]:
    """Limit and use of each cgroup that has a limit (v2 or v1), in bytes. Cached file pages do not count."""
    found: list[tuple[int, int]] = []
    for folder in _cgroups("memory"):
        for limit_name, used_name in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit = _read(folder / limit_name).strip()
            if limit.isdigit() and int(limit) < 2**60:
                used = int(_read(folder / used_name).strip() or 0)
                fields = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if " " in line)
                cached = fields.get("total_inactive_file") or fields.get("inactive_file") or 0
                found.append((int(limit), max(0, used - int(cached))))
    return found


def _cgroups(controller: str) -> list[Path]:
    """Folders of the cgroups that may limit this process: its own and those around it (cgroups(7)). In a container its own path
    may be the host's, and is not there; the top of what is mounted is then its own."""
    found: list[Path] = []
    for line in _read(OWN_CGROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top, names = CGROUPS / controller if controllers else CGROUPS, [part for part in path.split("/") if part]
        found += [top.joinpath(*names[:depth]) for depth in range(len(names), -1, -1)]
    return found


def killed_for_memory() -> int:
    """Processes that the kernel has ended for want of memory since the machine started (proc_vmstat(5), oom_kill)."""
    return next((int(line.split()[1]) for line in _read(Path("/proc/vmstat")).splitlines() if line.startswith("oom_kill ")), 0)


def boot_id() -> str:
    """Names this start of this machine (random(4)), containers included; empty where the system does not say."""
    return _read(Path("/proc/sys/kernel/random/boot_id")).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
