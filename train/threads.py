"""How many threads PyTorch computes with."""

from __future__ import annotations

import os

import torch

from asd_rt.machine import usable_cores


def use_threads(wanted: int = 0, beside: int = 1) -> int:
    """Compute with `wanted` threads.

    Args:
        wanted: threads; 0 = $OMP_NUM_THREADS, or without it the usable cores.
        beside: processes that share this machine's cores; with more than one the variable says nothing, as
            torchrun sets it to 1 unasked.

    Returns:
        how many it is.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    told_threads = int(told) if told.isdecimal() else 0
    threads = wanted or (told_threads if beside == 1 else 0) or max(1, usable_cores() // beside)
    torch.set_num_threads(threads)
    return threads
