"""How a student is meant to be run: block, window, schedule, size and vocabulary (deployment.json)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from asd_rt.errors import ConfigError


@dataclass(frozen=True)
class Deployment:
    """How a student is meant to be run; what deployment.json does not say has these defaults.

    Attributes:
        block_frames: latent frames denoised together in training.
        window_frames: latent frames that a pass attends to, 0 = all.
        sink_frames: leading latent frames that never leave the window.
        timestep_shift: of the noise schedule.
        latent_hw: the one latent size it was trained for; None = any.
        fps: frames a second of the decoded video.
        display_scale: whole factor by which a viewer enlarges frames.
        words: token id of each word that a prompt may hold; None = prompts come as embeddings.
        trained_frames: latent frames of the longest video in training; 0 = unknown.
    """

    block_frames: int = 3
    window_frames: int = 0
    sink_frames: int = 0
    timestep_shift: float = 5.0
    latent_hw: tuple[int, int] | None = None
    fps: int = 16
    display_scale: int = 1
    words: Mapping[str, int] | None = None
    trained_frames: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (
            ("block_frames", 1),
            ("window_frames", 0),
            ("sink_frames", 0),
            ("trained_frames", 0),
            ("fps", 1),
            ("display_scale", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ConfigError(
                    f"deployment: {name} must be a whole number >= {minimum}, found {value!r}"
                )
        shift = self.timestep_shift
        if not isinstance(shift, int | float) or isinstance(shift, bool) or not 0 < shift < inf:
            raise ConfigError(f"deployment: timestep_shift must be a number > 0, found {shift!r}")
        if self.latent_hw is not None:
            check_latent_hw(self.latent_hw, "deployment: latent_hw")
        if self.words is not None and not (
            isinstance(self.words, Mapping)
            and self.words
            and all(isinstance(k, str) and type(v) is int and v >= 0 for k, v in self.words.items())
        ):
            raise ConfigError("deployment: words must map words to whole numbers >= 0, or be null")


def check_latent_hw(value: object, where: str) -> tuple[int, int]:
    """`value` as (height, width), both even and at least 2.

    Raises:
        ConfigError: anything else.
    """
    if (
        not isinstance(value, tuple | list)
        or len(value) != 2
        or any(type(v) is not int or v < 2 or v % 2 for v in value)
    ):
        raise ConfigError(
            f"{where} must be two even numbers >= 2 (latent height and width), found {value!r}"
        )
    return value[0], value[1]
