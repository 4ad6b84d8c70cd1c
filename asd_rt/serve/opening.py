"""How an engine is opened for several videos at once: in turns on all cores, or side by side.

A pass of a small network is hundreds of operators of a few microseconds, which more threads hardly make
faster: each core then does better with a video of its own. Large products fill all cores, and taking turns
is as fast and shows every block sooner. `python -m benchmarks.batching` measures both.
"""

from __future__ import annotations

from pathlib import Path

from asd_rt.backends.base import runs_on_cpu
from asd_rt.errors import ConfigError
from asd_rt.machine import usable_cores
from asd_rt.manifest import Manifest
from asd_rt.session import Session, open_session

SMALL_BYTES = 16 << 20  # of a network's weights


def open_shared(
    path: Path,
    manifest: Manifest,
    videos: int,
    threads: int | None = None,
    workers: int | None = None,
    device: str = "auto",
) -> tuple[Session, int]:
    """Open the engine at `path`, and say how many threads may make blocks side by side.

    Args:
        path: of the engine.
        manifest: of it.
        videos: that there is room for.
        threads: CPU threads in all; None = usable cores.
        workers: videos made side by side, which share the threads; None = what suits the engine.
        device: as in `open_backend`.

    Raises:
        ConfigError: videos of this engine cannot be made so.
        EngineError, BackendError: as `open_session`.
    """
    on_cpu = runs_on_cpu(path, manifest, device)
    where = "on a card" if not on_cpu else "on OpenVINO" if manifest.runtime == "openvino" else None
    if where is not None:
        if workers is not None and workers > 1:
            raise ConfigError(
                f"--workers {workers}: videos take turns {where}, where one fills it; leave --workers out"
            )
        return open_session(path, threads, device="cpu" if on_cpu else device), 1
    total = threads or usable_cores()
    if workers is None:
        stored = manifest.parts.get("weights", manifest.parts["denoiser"])
        workers = min(total, videos) if stored.bytes < SMALL_BYTES else 1
    elif workers > total:
        raise ConfigError(
            f"--workers {workers}: there are {total} threads to share; give fewer workers or more --threads"
        )
    return open_session(path, total // workers, device="cpu"), workers
