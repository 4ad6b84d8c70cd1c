"""The loop around every training stage: progress bar, curves, resumable checkpoints, pictures on the way."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from asd_rt.errors import CheckpointError, ConfigError
from train.curves import Curves
from train.parallel import SINGLE, Parallel
from train.sharded import folders, load_sharded, read_mark, save_sharded

log = logging.getLogger(__name__)
PREVIEW_EVERY_S = 300.0


class Stage(ABC):
    """One stage of training. All randomness of step i derives from (seed, stage, i), so a resumed stage
    goes on exactly where it was. What micro-batches other than the first draw derives from their number too.

    Attributes:
        name: of the stage, its section in the configuration and its checkpoints.
        steps: in all.
        parallel: the processes that train it.
    """

    name: str
    steps: int
    parallel: Parallel = SINGLE

    @abstractmethod
    def step(self, index: int) -> dict[str, float]:
        """Do training step `index`; returns figures for the curve, "loss" among them."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything that `load` needs to go on: nested dictionaries of tensors."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Take up a state saved by `state`."""


def step_generator(seed: int, stage: str, index: int, share: int = 0) -> torch.Generator:
    """The random stream of one micro-batch (`share`) of a training step."""
    if share:
        key = hashlib.sha256(f"{seed} {stage} {index} {share}".encode()).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    salt = sum(ord(c) << (8 * (i % 3)) for i, c in enumerate(stage))
    key = (seed * 1_000_003 + salt) * 1_000_003 + index
    return torch.Generator().manual_seed(key % 2**64)


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


class Checkpoints:
    """Where a stage's checkpoints are: one file RUN/<stage>.pt, or sharded ones in RUN/<stage>/."""

    def __init__(self, run_dir: Path, name: str, sharded: bool) -> None:
        self.sharded, self._saved = sharded, -1
        self.place = run_dir / name if sharded else run_dir / f"{name}.pt"

    def latest(self) -> tuple[Path, Mapping[str, Any]] | None:
        """The newest checkpoint, and its `fingerprint` and `step`; None where there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        if self.sharded:
            found = folders(self.place)
            return (found[-1], read_mark(found[-1])) if found else None
        return (self.place, load_torch(self.place)) if self.place.exists() else None

    def finished(self, fingerprint: str, steps: int) -> Path:
        """The checkpoint of a stage that is through with its `steps`.

        Raises:
            ConfigError: it is not there, of another configuration, or of an earlier step.
        """
        found, name = self.latest(), self.place.stem
        if found is None:
            raise ConfigError(
                f"{self.place}: missing; run the stage {name} first (--stages {name})"
            )
        path, mark = found
        if mark["fingerprint"] != fingerprint:
            raise ConfigError(
                f"{path}: made with another configuration or seed; delete it to train it again"
            )
        if mark["step"] < steps:
            raise ConfigError(
                f"{path}: only {mark['step']} of {steps} steps are done; "
                f"run again with --resume --stages {name} first"
            )
        return path

    def load(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """The state in a checkpoint; of shards, the tensors of `state`, which are overwritten."""
        if not self.sharded:
            return dict(load_torch(path)["stage"])
        load_sharded(path, state)
        return state

    def save(self, fingerprint: str, step: int, state: dict[str, Any], parallel: Parallel) -> None:
        if (
            self.sharded and step != self._saved
        ):  # else it is the last step, whose turn had just come
            save_sharded(self.place, fingerprint, step, state, parallel)
            self._saved = step
        elif not self.sharded:
            save_torch({"fingerprint": fingerprint, "step": step, "stage": state}, self.place)


def run_stage(
    stage: Stage,
    run_dir: Path,
    fingerprint: str,
    preview: Callable[[int], None] | None = None,
    sharded: bool = False,
    save_every_s: float | None = None,
    stop: Callable[[], bool] | None = None,
) -> bool:
    """Run `stage` to its end, resuming from its newest checkpoint in `run_dir` where there is one.

    Args:
        stage: what to train.
        run_dir: where checkpoints and curves go.
        fingerprint: hash of configuration and seed; a checkpoint of another one is refused.
        preview: called with the steps done every few minutes, to show what the stage can do.
        sharded: keep checkpoints in shards, as more than one process needs it.
        save_every_s: seconds between checkpoints; None = as `stage.parallel` says.
        stop: asked after every step whether to save and leave off.

    Returns:
        whether the stage is at its end.

    Raises:
        ConfigError: the newest checkpoint is of another configuration or seed.
        CheckpointError: it is damaged, or another version's.
    """
    parallel, checkpoints, start = stage.parallel, Checkpoints(run_dir, stage.name, sharded), 0
    found = checkpoints.latest()
    if found is not None:
        path, mark = found
        if mark.get("fingerprint") != fingerprint:
            raise ConfigError(
                f"{path}: made with another configuration or seed; name another --out, or remove "
                f"{checkpoints.place} to train this stage anew"
            )
        start = int(mark["step"])
        try:
            stage.load(checkpoints.load(path, stage.state() if sharded else {}))
        except KeyError as error:
            raise CheckpointError(
                f"{path}: holds no {error}, so another version of this code saved it; resume with that "
                "version, or delete the file to train the stage again"
            ) from error
        if start < stage.steps and parallel.first:
            log.info("%s: resumed at step %d of %d", stage.name, start, stage.steps)
    if start >= stage.steps:
        return True
    if save_every_s is None:
        save_every_s = 60 * parallel.settings.save_minutes

    last_save = last_preview = time.monotonic()
    with ExitStack() as stack:
        curves = None
        if parallel.first:
            curves = stack.enter_context(Curves(run_dir, stage.name, start, stage.steps))
        bar = stack.enter_context(
            tqdm(
                total=stage.steps,
                initial=start,
                desc=stage.name,
                unit="step",
                mininterval=1.0,
                disable=not parallel.first,
            )
        )

        def save(done: int) -> None:
            # Curves first: resuming drops records past its checkpoint, and cannot bring back missing ones.
            if curves is not None:
                curves.flush()
            checkpoints.save(fingerprint, done, stage.state(), parallel)

        for index in range(start, stage.steps):
            began = time.perf_counter()
            figures = stage.step(index)
            if not all(math.isfinite(v) for v in figures.values()):
                kept = checkpoints.latest()
                last = f"the last checkpoint is {kept[0]}" if kept else "there is no checkpoint yet"
                raise CheckpointError(
                    f"{stage.name} step {index}: a figure is not finite ({figures}); {last}; --resume would "
                    f"repeat it: lower the learning rates of [{stage.name}], remove {checkpoints.place} and "
                    "run with --resume to train this stage anew"
                )
            if curves is not None:
                curves.add(index, time.perf_counter() - began, figures)
            bar.update()
            if index % 10 == 0:
                bar.set_postfix({k: f"{v:.3f}" for k, v in figures.items()}, refresh=False)
            if preview is not None and time.monotonic() - last_preview > PREVIEW_EVERY_S:
                preview(index + 1)
                last_preview = time.monotonic()
            if stop is not None and index + 1 < stage.steps and parallel.agree(stop()):
                save(index + 1)
                return False
            if parallel.agree(time.monotonic() - last_save > save_every_s):
                save(index + 1)
                last_save = time.monotonic()
        save(stage.steps)
    return True
