"""What the networks are trained in: bfloat16 products where the processor has such, else float32."""

from __future__ import annotations

import logging
from functools import cache

import torch

from asd_rt.machine import bf16_instructions

log = logging.getLogger(__name__)


@cache
def has_bf16() -> bool:
    """Whether products in bfloat16 pay here; PyTorch computes them anywhere, without instructions many times
    slower than in float32.
    """
    if bf16_instructions():
        return True
    log.info("this processor has no bfloat16 instructions: training in float32")
    return False


def mixed_precision() -> torch.autocast:
    """A context in which products are computed in bfloat16, where that is faster."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16())
