"""The judge of the tiny world for benchmarks, who see latents of the shipped student."""

from __future__ import annotations

from dataclasses import replace

from export.build import default_checkpoint
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.judge import Judge, load_judge

# A digit may have turned round, so only the axes of its motion count.
NAMES = ("digit", "colour", "axes")


def shipped_judge(config: TrainConfig | None = None) -> Judge:
    """The judge (see `train.judge.load_judge`) with the shipped student's own codec."""
    codec = load_checkpoint(default_checkpoint()).codec
    if codec is None:
        raise ValueError(f"{default_checkpoint()}: the shipped student has no codec")
    return replace(load_judge(config), codec=codec)
