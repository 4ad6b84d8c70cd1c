"""The loop around every training stage: progress bar, curves, resumable checkpoints, pictures on the way."""

from __future__ import annotations

import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from asd_rt.errors import CheckpointError, ConfigError
from train.curves import Curves

log = logging.getLogger(__name__)
SAVE_EVERY_S = 60.0
PREVIEW_EVERY_S = 300.0


class Stage(ABC):
    """One stage of training. All randomness of step i derives from (seed, stage, i), so a resumed stage
    goes on exactly where it was.
    """

    name: str
    steps: int

    @abstractmethod
    def step(self, index: int) -> dict[str, float]:
        """Do training step `index`; returns figures for the curve, "loss" among them."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything that `load` needs to go on."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Take up a state saved by `state`."""


def step_generator(seed: int, stage: str, index: int) -> torch.Generator:
    """The random stream of one training step."""
    salt = sum(ord(c) << (8 * (i % 3)) for i, c in enumerate(stage))
    return torch.Generator().manual_seed((seed * 1_000_003 + salt) * 1_000_003 + index)


def save_torch(state: dict[str, Any], path: Path) -> None:
    """torch.save by way of a temporary name: a crash or a full disk leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: cannot be saved ({error}); the file before it is intact"
        ) from error


def load_torch(path: Path) -> dict[str, Any]:
    """torch.load with weights_only.

    Raises:
        CheckpointError: unreadable or not a checkpoint.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({error}); delete it to start over"
        ) from error
    return state


def run_stage(
    stage: Stage, run_dir: Path, fingerprint: str, preview: Callable[[int], None] | None = None
) -> None:
    """Run `stage` to its end, resuming from `run_dir`/<name>.pt where that exists.

    Args:
        stage: what to train.
        run_dir: where checkpoints and curves go.
        fingerprint: hash of configuration and seed; a checkpoint of another one is refused.
        preview: called with the steps done every few minutes, to show what the stage can do.
    """
    path = run_dir / f"{stage.name}.pt"
    start = 0
    if path.exists():
        saved = load_torch(path)
        if saved.get("fingerprint") != fingerprint:
            raise ConfigError(
                f"{path}: made with another configuration or seed; use another --out, or delete {run_dir}"
            )
        start = int(saved["step"])
        stage.load(saved["stage"])
        if start < stage.steps:
            log.info("%s: resumed at step %d of %d", stage.name, start, stage.steps)
    if start >= stage.steps:
        return

    def save(done: int) -> None:
        save_torch({"fingerprint": fingerprint, "step": done, "stage": stage.state()}, path)

    last_save = last_preview = time.monotonic()
    bar = tqdm(total=stage.steps, initial=start, desc=stage.name, unit="step", mininterval=1.0)
    with Curves(run_dir, stage.name, start, stage.steps) as curves, bar:
        for index in range(start, stage.steps):
            began = time.perf_counter()
            figures = stage.step(index)
            if not all(math.isfinite(v) for v in figures.values()):
                raise CheckpointError(
                    f"{stage.name} step {index}: a figure is not finite ({figures}); the checkpoint {path} "
                    "is of an earlier step; lower the learning rate and run again with --resume"
                )
            seconds = time.perf_counter() - began
            curves.add(index, seconds, figures)
            bar.update()
            if index % 10 == 0:
                bar.set_postfix({k: f"{v:.3f}" for k, v in figures.items()}, refresh=False)
            if preview is not None and time.monotonic() - last_preview > PREVIEW_EVERY_S:
                preview(index + 1)
                last_preview = time.monotonic()
            if time.monotonic() - last_save > SAVE_EVERY_S:
                save(index + 1)
                curves.flush()
                last_save = time.monotonic()
        save(stage.steps)
        curves.flush()


class Ema:
    """Exponential moving average of a network's parameters, float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: p.detach().clone() for k, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float | None = None) -> None:
        weight = 1 - (self.decay if decay is None else decay)
        torch._foreach_lerp_(
            list(self.values.values()), [p.detach() for p in model.parameters()], weight
        )


def warmup_cosine(index: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear rise over `warmup`, then half a cosine down to `floor`."""
    if index < warmup:
        return (index + 1) / warmup
    progress = (index - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
