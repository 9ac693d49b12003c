"""What a machine, or a container on it, has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune_assets.training import machine


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree in place of the kernel's, on a machine of 64 cores."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path / "cgroup"


def write(files: dict[Path, str]) -> None:
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")


def test_threads_fit_a_container_of_cgroup_v2(cgroups: Path):
    """`docker run --cpus 2 --memory 4g`: the container sees its own cgroup as the top."""
    write({machine.OWN_CGROUP: "0::/", cgroups / "cpu.max": "max 100000"})
    assert (machine.cpu_quota(), machine.cores(), machine.free_threads()) == (None, 64, machine.MOST_THREADS)
    write({cgroups / "cpu.max": "200000 100000"})
    assert (machine.cpu_quota(), machine.cores(), machine.default_threads(), machine.free_threads()) == (2.0, 2, 2, 2)
    write({cgroups / "cpu.max": "50000 100000"})
    assert (machine.cpu_quota(), machine.cores(), machine.free_threads()) == (0.5, 1, 1)
    whole = machine.total_memory()
    write({cgroups / "memory.max": "4000000", cgroups / "memory.current": "3000000"})
    write({cgroups / "memory.stat": "anon 1\ninactive_file 500000"})
    assert (machine.total_memory(), machine.available_memory()) == (4_000_000, 1_500_000)
    assert whole > 4_000_000


def test_the_strictest_of_the_cgroups_around_counts(cgroups: Path):
    """systemd's CPUQuota of a slice, on a service that has a looser one."""
    write({machine.OWN_CGROUP: "0::/a.slice/b.service", cgroups / "a.slice/b.service/cpu.max": "800000 100000"})
    assert machine.cores() == 8
    write({cgroups / "a.slice/cpu.max": "300000 100000"})
    assert machine.cores() == 3


def test_threads_fit_a_container_of_cgroup_v1(cgroups: Path):
    """Its own path is the host's, and is not there: the top of what is mounted is the container's."""
    write({machine.OWN_CGROUP: "4:cpu,cpuacct:/docker/1a2b\n3:memory:/docker/1a2b\n1:name=systemd:/docker/1a2b"})
    write({cgroups / "cpu/cpu.cfs_quota_us": "-1", cgroups / "cpu/cpu.cfs_period_us": "100000"})
    assert machine.cores() == 64
    write({cgroups / "cpu/cpu.cfs_quota_us": "150000"})
    assert (machine.cpu_quota(), machine.cores()) == (1.5, 2)
    write({cgroups / "memory/memory.limit_in_bytes": str(2**63 - 4096)})  # none
    assert machine.total_memory() > 2**30
    write({cgroups / "memory/memory.limit_in_bytes": "4000000", cgroups / "memory/memory.usage_in_bytes": "1000000"})
    write({cgroups / "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 500000"})
    assert (machine.total_memory(), machine.available_memory()) == (4_000_000, 3_500_000)


def test_a_system_without_cgroups_has_all_its_cores(cgroups: Path):
    assert (machine.cpu_quota(), machine.cores()) == (None, 64)
