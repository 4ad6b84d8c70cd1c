"""Cores that are really usable: affinity, hyper-threads, and both versions of control groups."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asd_rt import machine


def group(root: Path, name: str, files: dict[str, str]) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text + "\n")


def membership(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "membership"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("own", "above", "limit"),
    [
        ("max 100000", "max 100000", None),
        ("150000 100000", "max 100000", 1.5),
        ("max 100000", "50000 100000", 0.5),
        ("400000 100000", "200000 100000", 2.0),
    ],
)
def test_cgroup_v2_takes_the_smallest_limit_on_the_way(tmp_path, own, above, limit) -> None:
    root = tmp_path / "cgroup"
    group(root, "box", {"cpu.max": above})
    group(root, "box/job", {"cpu.max": own})
    assert machine.cgroup_cpu_limit(root, membership(tmp_path, "0::/box/job")) == limit


@pytest.mark.parametrize(("quota", "limit"), [("-1", None), ("250000", 2.5)])
def test_cgroup_v1(tmp_path, quota, limit) -> None:
    root = tmp_path / "cgroup"
    group(root, "cpu,cpuacct/job", {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"})
    lines = ("5:memory:/other", "3:cpu,cpuacct:/job", "0::/")
    assert machine.cgroup_cpu_limit(root, membership(tmp_path, *lines)) == limit


def test_no_control_groups(tmp_path) -> None:
    assert machine.cgroup_cpu_limit(tmp_path / "none", tmp_path / "neither") is None


@pytest.mark.parametrize(("limit", "cores"), [(None, 4), (2.5, 3), (0.2, 1), (64.0, 4)])
def test_usable_cores(monkeypatch, limit, cores) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda cpus: 4)
    monkeypatch.setattr(machine, "cgroup_cpu_limit", lambda: limit)
    assert machine.usable_cores() == cores


def test_hyper_threads_count_once(monkeypatch, tmp_path) -> None:
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        group(tmp_path, f"cpu{cpu}/topology", {"thread_siblings_list": siblings})
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    assert machine.physical_cores([0, 1, 2, 3]) == 2
    assert machine.physical_cores([1, 3]) == 1
    assert machine.physical_cores([7, 8]) == 2  # unknown: each counts


def test_respects_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    os.sched_setaffinity(0, one)
    try:
        assert machine.affinity_cpus() == sorted(one)
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("own", "above", "left"),
    [
        (("max", "100"), ("max", "100"), None),
        (("1000", "300"), ("max", "900"), 750),
        (("1000", "300"), ("1200", "900"), 350),
        (("100", "300"), ("max", "300"), 0),
    ],
)
def test_memory_that_groups_leave(tmp_path, own, above, left) -> None:
    """A group may still take what is left of its limit, and the 50 bytes of files that can be dropped."""
    root = tmp_path / "cgroup"
    for name, (limit, used) in (("box", above), ("box/job", own)):
        stat = "anon 7\ninactive_file 50\nactive_file 9"
        group(root, name, {"memory.max": limit, "memory.current": used, "memory.stat": stat})
    assert machine.cgroup_memory_left(root, membership(tmp_path, "0::/box/job")) == left


def test_memory_that_groups_of_version_1_leave(tmp_path) -> None:
    files = {"memory.limit_in_bytes": "500", "memory.usage_in_bytes": "200"}
    group(tmp_path / "cgroup", "memory/job", {**files, "memory.stat": "total_inactive_file 25"})
    lines = ("4:memory:/job", "0::/")
    assert machine.cgroup_memory_left(tmp_path / "cgroup", membership(tmp_path, *lines)) == 325


def test_memory_of_this_machine() -> None:
    available, resident = machine.available_memory_bytes(), machine.resident_memory_bytes()
    assert available is not None
    assert 0 < available <= (machine.total_memory_bytes() or 0)
    # Not from the allocator, which may have pages that are resident already.
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held[:] = b"x" * len(held)
        assert machine.resident_memory_bytes() >= resident + (48 << 20)


def test_freed_memory_goes_back() -> None:
    script = """
from asd_rt.machine import give_back_memory, resident_memory_bytes
small = [bytearray(20_000) for _ in range(4000)]  # from the heap, not pages of their own
full = resident_memory_bytes()
last = small[-1]  # the heap's end stays taken
del small
kept = resident_memory_bytes()
give_back_memory()
print(full, kept, resident_memory_bytes())
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    full, kept, left = map(int, out.stdout.split())
    assert kept > full - (20 << 20), "the C library keeps it"
    assert left < full - (60 << 20)
