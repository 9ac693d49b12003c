"""What this machine has, without importing torch: cores, memory, GPU, the arithmetic of its processor."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

MOST_THREADS = 8


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """As many as cores, at most 8. The worker's threads sleep while they wait, so a busy core costs little."""
    return min(cores(), MOST_THREADS)


def free_threads() -> int:
    """As many as the cores that other processes leave (by the load of the last minute), at least 1: a training that shares its
    cores takes more CPU time for the same work, and is no sooner done."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, min(default_threads(), round((os.cpu_count() or 1) - busy)))


def default_precision() -> str:
    """`bfloat16` where the CPU multiplies it natively (AVX512-BF16, AMX: twice as fast), else `float32`; a GPU decides itself."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products."""
    flags = _read("/proc/cpuinfo")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU."""
    return gpus() > 0


def gpus() -> int:
    """GPUs that the NVIDIA driver shows."""
    shown = Path("/proc/driver/nvidia/gpus")
    return len(list(shown.iterdir())) if shown.exists() else 0


def has_package(name: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(name) is not None


def total_memory() -> int:
    """Bytes that this process could ever have: of the machine, or of its cgroup where that is less."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = _cgroup()
    return min(pages, limit) if limit is not None else pages


def available_memory() -> int | None:
    """Bytes that can be allocated now without pushing anybody out; None where the system does not say."""
    free = next(
        (int(line.split()[1]) * 1024 for line in _read("/proc/meminfo").splitlines() if line.startswith("MemAvailable")), None
    )
    limit, used = _cgroup()
    room = limit - used if limit is not None else None
    return min(value for value in (free, room) if value is not None) if free is not None or room is not None else None


def _cgroup() -> tuple[int | None, int]:
    """Memory limit (None: unlimited) and use of the container (cgroup v2 or v1), in bytes. Cached file pages do not count."""
    for folder, limit_name, used_name in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit = _read(f"{folder}/{limit_name}").strip()
        if limit.isdigit() and int(limit) < 2**60:
            used = int(_read(f"{folder}/{used_name}").strip() or 0)
            fields = dict(line.split()[:2] for line in _read(f"{folder}/memory.stat").splitlines() if " " in line)
            return int(limit), max(0, used - int(fields.get("inactive_file", 0)))
    return None, 0


def killed_for_memory() -> int:
    """Processes that the kernel has ended for want of memory since the machine started (proc_vmstat(5), oom_kill)."""
    return next((int(line.split()[1]) for line in _read("/proc/vmstat").splitlines() if line.startswith("oom_kill ")), 0)


def boot_id() -> str:
    """Names this start of this machine (random(4)), containers included; empty where the system does not say."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
