"""What one build makes: flags over deployment.json over config.json over defaults, checked as a whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import asd_rt
from asd_rt.config import CacheConfig
from asd_rt.errors import ConfigError
from asd_rt.manifest import Manifest, Part
from asd_rt.plan import FixedPlan
from asd_rt.planner import runtime_of
from asd_rt.schedule import STEP_LISTS, Schedule
from train.checkpoint import Checkpoint
from train.codec import PATCH
from train.deployment import check_latent_hw

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overrides:
    """Flags that may replace what a checkpoint says; None = as it says."""

    block_frames: int | None = None
    window_frames: int | None = None
    sink_frames: int | None = None
    timestep_shift: float | None = None
    latent_hw: tuple[int, int] | None = None
    max_frames: int | None = None


@dataclass(frozen=True)
class Settings:
    """Geometry, schedule and default plan of the engines of one build."""

    cache: CacheConfig
    schedule: Schedule
    latent_hw: tuple[int, int] | None
    plan: FixedPlan

    @property
    def capacity_frames(self) -> int:
        """Frames that a cache buffer holds; 0 = as many as a video has."""
        return self.cache.window_frames or self.cache.max_frames


def resolve(checkpoint: Checkpoint, flags: Overrides, plan: FixedPlan) -> Settings:
    """Settings of a build.

    Raises:
        ConfigError: values that cannot work together, or a latent size that differs from the one the
            checkpoint is fixed to.
    """
    told = checkpoint.deployment

    def pick(flag: Any, value: Any) -> Any:
        return value if flag is None else flag

    cache = CacheConfig(
        block_frames=pick(flags.block_frames, told.block_frames),
        window_frames=pick(flags.window_frames, told.window_frames),
        sink_frames=pick(flags.sink_frames, told.sink_frames),
        max_frames=pick(flags.max_frames, 0),
    )
    latent_hw = pick(flags.latent_hw, told.latent_hw)
    if latent_hw is not None:
        latent_hw = check_latent_hw(latent_hw, "--latent-size")
    if told.latent_hw is not None and latent_hw != told.latent_hw:
        raise ConfigError(
            f"--latent-size {latent_hw[0]}x{latent_hw[1]}: checkpoint {checkpoint.name} was trained for "
            f"{told.latent_hw[0]}x{told.latent_hw[1]} alone; leave the flag out"
        )
    _warn_untrained(checkpoint, cache)
    schedule = Schedule(float(pick(flags.timestep_shift, told.timestep_shift)))
    return Settings(cache, schedule, latent_hw, plan)


def _warn_untrained(checkpoint: Checkpoint, cache: CacheConfig) -> None:
    """Say where an engine is to do what its checkpoint was not trained for."""
    told = checkpoint.deployment
    if cache.block_frames != told.block_frames:
        log.warning(
            "--block-frames %d: checkpoint %s is for blocks of %d frames; expect a worse picture",
            *(cache.block_frames, checkpoint.name, told.block_frames),
        )
    if told.window_frames and not 0 < cache.window_frames <= told.window_frames:
        log.warning(
            "--window-frames %d: checkpoint %s never saw more than %d frames at once",
            *(cache.window_frames, checkpoint.name, told.window_frames),
        )


def make_manifest(
    checkpoint: Checkpoint,
    settings: Settings,
    precision: str,
    backend: str,
    parts: Mapping[str, Part],
    gpus: tuple[str, ...] = (),
    parity: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of an engine of these settings."""
    told, schedule = checkpoint.deployment, settings.schedule
    return Manifest(
        name=f"asd_{precision}",
        precision=precision,
        backend=backend,
        runtime=runtime_of(backend, precision, checkpoint.config),
        model=checkpoint.config,
        cache=settings.cache,
        latent_hw=settings.latent_hw,
        timestep_shift=schedule.shift,
        step_lists={
            str(count): {
                "steps": list(steps),
                "timesteps": [step.timestep for step in schedule.steps(count)],
                "sigmas": [step.sigma for step in schedule.steps(count)],
            }
            for count, steps in STEP_LISTS.items()
        },
        default_plan={"steps": settings.plan.steps, "first_steps": settings.plan.first_steps},
        fps=told.fps,
        display_scale=told.display_scale,
        tokenizer=None if told.words is None else {"kind": "vocabulary", "words": dict(told.words)},
        parts=parts,
        checkpoint={"name": checkpoint.name, "sha256": checkpoint.sha256}
        | ({"trained_frames": told.trained_frames} if told.trained_frames else {}),
        tools=tool_versions(backend),
        gpus=gpus,
        codec=_own_codec(checkpoint) if "decoder" in parts else None,
        parity=dict(parity or {}),
    )


def _own_codec(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if checkpoint.codec is None:
        return None
    return {"kind": "linear", "spatial": PATCH, "temporal": 1}


def tool_versions(backend: str) -> dict[str, str]:
    """Versions of what an engine of `backend` depends on."""
    found = {"asd-rt": asd_rt.__version__} | {
        name: version(name) for name in ("torch", "onnx", "onnxscript")
    }
    if backend != "onnx":
        from export.tensorrt import import_tensorrt

        found[backend] = str(import_tensorrt().__version__)
    return found
