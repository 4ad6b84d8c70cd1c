"""What this machine offers to a process: usable cores, instruction sets, memory."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_INSTRUCTION_SETS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd"),
)


def affinity_cpus() -> list[int]:
    """Logical CPUs that the scheduler may run this process on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores(cpus: list[int]) -> int:
    """Distinct cores among logical `cpus`: two hyper-threads of one core count once."""
    return len(
        {_read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    )


def cgroup_cpu_limit(
    root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """CPUs' worth of time that control groups grant (a container's --cpus), None = no limit.

    A limit may be set on any group above the process's own, so the smallest one on the way counts.
    """
    limits = []
    for line in _read(membership).splitlines():
        hierarchy, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if hierarchy == "0" and not controllers:
            base = root
        elif "cpu" in controllers.split(","):
            base = next(
                (root / name for name in (controllers, "cpu") if (root / name).is_dir()), root
            )
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            limits.append(_quota(folder))
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def _quota(folder: Path) -> float | None:
    """Limit set on one group, read in the form of cgroup v2, then of v1."""
    fields = _read(folder / "cpu.max").split() or [
        _read(folder / "cpu.cfs_quota_us"),
        _read(folder / "cpu.cfs_period_us"),
    ]
    try:
        quota, period = float(fields[0]), float(fields[1])
    except (ValueError, IndexError):  # "max", or no such file: no limit here
        return None
    return quota / period if quota > 0 and period > 0 else None


def usable_cores() -> int:
    """Cores worth a thread each: affinity without hyper-threads, within the cgroup's limit."""
    cores = physical_cores(affinity_cpus())
    limit = cgroup_cpu_limit()
    return max(1, cores if limit is None else min(cores, math.ceil(limit)))


def cpu_model() -> str:
    """Name of the processor, "" where unknown."""
    return _cpuinfo("model name")


def instruction_sets() -> list[str]:
    """Vector and matrix extensions that matter to inference, of those this processor has."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [name for name in _INSTRUCTION_SETS if name in flags]


def total_memory_bytes() -> int | None:
    """Installed memory; None where unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _cpuinfo(key: str) -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    """Text of a small system file, "" when it is absent or not readable (which is then no information)."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
