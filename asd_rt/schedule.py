"""Noise schedule: step lists, warped timesteps, and the arithmetic between noise, flow and x0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import ConfigError

TRAIN_TIMESTEPS = 1000
STEP_LISTS: dict[int, tuple[int, ...]] = {
    1: (1000,),
    2: (1000, 500),
    3: (1000, 750, 500),
    4: (1000, 750, 500, 250),
}
MAX_STEPS = 4
CLEAN_TIMESTEP = 0.0  # of the pass that only writes keys and values

FloatArray = NDArray[np.float32]


def check_steps(steps: object, name: str = "steps") -> int:
    """`steps` as an int in 1..4.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"{name} must be 1, 2, 3 or 4, found {steps!r}")
    return steps


@dataclass(frozen=True)
class Step:
    """One denoising step: the network's `timestep` (0..1000) and its noise level `sigma` (0..1)."""

    timestep: float
    sigma: float


@dataclass(frozen=True)
class Schedule:
    """Wan's flow-matching schedule with a timestep shift.

    u = linspace(1, 0, 1001)[:-1], sigma = s*u / (1 + (s-1)*u), t = 1000*sigma, all in float32 as the
    reference does. A step list is warped by t = timesteps[1000 - step]. Source: Wan2.1, Self-Forcing.
    """

    shift: float

    def __post_init__(self) -> None:
        if not np.isfinite(self.shift) or self.shift <= 0:
            raise ConfigError(f"timestep shift must be a number > 0, found {self.shift!r}")

    def steps(self, count: int) -> tuple[Step, ...]:
        """The steps of a `count`-step plan, noisiest first."""
        return tuple(self.step_at(value) for value in STEP_LISTS[check_steps(count)])

    def step_at(self, value: int) -> Step:
        """The step that an unwarped timestep `value` (1..1000) is warped to."""
        shift = np.float32(self.shift)
        u = np.float32(value) / np.float32(TRAIN_TIMESTEPS)
        sigma = shift * u / (np.float32(1) + (shift - np.float32(1)) * u)
        return Step(timestep=float(sigma * np.float32(TRAIN_TIMESTEPS)), sigma=float(sigma))


def add_noise(x0: FloatArray, noise: FloatArray, sigma: float) -> FloatArray:
    """x_t = (1 - sigma) * x0 + sigma * noise, float32."""
    level = np.float32(sigma)
    return (np.float32(1) - level) * x0 + level * noise


def flow_to_x0(flow: FloatArray, x_t: FloatArray, sigma: float) -> FloatArray:
    """x0 = x_t - sigma * flow, in float64 as the reference does, cast back to float32."""
    scaled = np.multiply(flow, sigma, dtype=np.float64)
    return np.subtract(x_t, scaled, dtype=np.float64).astype(np.float32)
