"""What this machine offers to a process: usable cores, instruction sets, memory."""

from __future__ import annotations

import ctypes
import gc
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
    limits = [_quota(folder) for folder in _groups("cpu", root, membership)]
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def cgroup_memory_left(
    root: Path = _CGROUP, membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes that control groups still grant (a container's --memory), None = no limit."""
    rooms = [_room(folder) for folder in _groups("memory", root, membership)]
    found = [room for room in rooms if room is not None]
    return min(found) if found else None


def _groups(controller: str, root: Path, membership: Path) -> list[Path]:
    """Folders of the groups that this process is in, of both versions, its own first."""
    folders: list[Path] = []
    for line in _read(membership).splitlines():
        hierarchy, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if hierarchy == "0" and not controllers:
            base = root
        elif controller in controllers.split(","):
            names = (controllers, controller)
            base = next((root / name for name in names if (root / name).is_dir()), root)
        else:
            continue
        group = base / path.lstrip("/")
        folders += [f for f in (group, *group.parents) if f.is_relative_to(base)]
    return folders


def _room(folder: Path) -> int | None:
    """Bytes left within one group's limit; what it holds of files that can be dropped counts as free."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = _read(folder / limit), _read(folder / usage)
        if most.isdecimal() and used.isdecimal():
            stat = _read(folder / "memory.stat").splitlines()
            dropped = next((line.split()[1] for line in stat if line.startswith(f"{cache} ")), "0")
            return max(0, int(most) - int(used) + int(dropped))
    return None


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


def bf16_instructions() -> list[str]:
    """Those that multiply matrices of bfloat16; without one such products are slower than in float32."""
    return [name for name in instruction_sets() if name in ("amx_bf16", "avx512_bf16")]


def total_memory_bytes() -> int | None:
    """Installed memory; None where unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def available_memory_bytes() -> int | None:
    """Memory that can still be taken without swapping, within control groups' limits; None where unknown."""
    free = None
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            free = int(value.split()[0]) * 1024
    known = [n for n in (free, cgroup_memory_left()) if n is not None]
    return min(known) if known else None


def resident_memory_bytes() -> int:
    """Memory of this process that is its own and in RAM; 0 where unknown."""
    for line in _read(Path("/proc/self/status")).splitlines():
        name, _, value = line.partition(":")
        if name == "RssAnon":
            return int(value.split()[0]) * 1024
    return 0


def give_back_memory() -> None:
    """Give freed memory back to the system, all of it that lies in whole pages.

    The C library keeps what is freed between two things that live, which after a burst of large requests is
    megabytes. Does nothing where there is no GNU C library.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
