"""What every run begins with: its folder, and its threads."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from asd_rt.errors import ConfigError, OutputError
from train.parallel import Parallel


def open_run(out: Path, resume: bool, threads: int, parallel: Parallel) -> None:
    """Make the folder of a run, and share the processor's cores among the processes of this machine.

    Args:
        out: the folder.
        resume: go on with a run that it already holds.
        threads: of each process, 0 = its share of usable cores.
        parallel: all processes call this.

    Raises:
        ConfigError: it holds a run and `resume` is not set.
        OutputError: it cannot be made.
    """
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // beside))
    if not resume and any([*out.glob("*.pt"), *out.glob("*/step_*")]):
        raise ConfigError(
            f"{out} already holds a run; go on with it by --resume, or name another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: cannot be created ({error}); name another --out") from error
    parallel.wait()
