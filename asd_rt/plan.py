"""Plans: how many denoising steps each block gets. First-Frame Enhancement gives the first block more."""

from __future__ import annotations

from dataclasses import dataclass

from asd_rt.costs import Kind
from asd_rt.deadline import DeadlinePlan
from asd_rt.errors import ConfigError
from asd_rt.schedule import MAX_STEPS, check_steps


class _Unwatched:
    """A plan that does not look at the clock takes what a frame loop tells every plan, and forgets it."""

    def begin(self, block: int, past_frames: int, joined: bool = False, anew: bool = False) -> None:
        """A block begins; see DeadlinePlan."""

    def observe(self, kind: Kind, past_frames: int, ms: float) -> None:
        """A piece of work took `ms`."""

    def charge(self, ms: float) -> None:
        """Other work took `ms` before the next block."""

    def finish(self, block: int, taken_ms: float) -> None:
        """A block is out."""

    def report(self, block: int) -> None:
        """There is no deadline to report on."""


@dataclass(frozen=True)
class FixedPlan(_Unwatched):
    """`steps` for every block but the first, which gets `first_steps` (FFE).

    Source: ASD paper, section on First-Frame Enhancement: errors of the first block spread.
    """

    steps: int = 1
    first_steps: int = MAX_STEPS

    def __post_init__(self) -> None:
        check_steps(self.steps, "steps")
        check_steps(self.first_steps, "first-steps")

    def steps_of(self, block: int) -> int:
        """Denoising steps of generated block `block` (0 = the first one generated)."""
        return self.first_steps if block == 0 else self.steps


@dataclass(frozen=True)
class ListedPlan(_Unwatched):
    """Steps block by block; the last number serves all further blocks."""

    steps_per_block: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.steps_per_block:
            raise ConfigError("steps-per-block must name at least one number of steps")
        for steps in self.steps_per_block:
            check_steps(steps, "steps-per-block")

    def steps_of(self, block: int) -> int:
        """Denoising steps of generated block `block`."""
        return self.steps_per_block[min(block, len(self.steps_per_block) - 1)]


Plan = FixedPlan | ListedPlan | DeadlinePlan


def count_blocks(frames: int, block_frames: int) -> int:
    """Blocks needed for at least `frames` latent frames; 0 (endless) stays 0.

    Raises:
        ConfigError: `frames` is not a whole number >= 0.
    """
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 0:
        raise ConfigError(f"frames must be a whole number >= 0 (0 = endless), found {frames!r}")
    return -(-frames // block_frames)
