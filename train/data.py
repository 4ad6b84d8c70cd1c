"""What stages train from: prompts and clips, of the tiny world or of real videos."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Clips of one micro-batch.

    Attributes:
        latents: float32 [B, F, C, h, w].
        context: their prompts, [B, tokens, text_dim].
        positions: the frame index that each frame is shown as.
    """

    latents: Tensor
    context: Tensor
    positions: list[int]


class Contexts(NamedTuple):
    """The prompts of one micro-batch, each [B, tokens, text_dim].

    Attributes:
        rollout: what the student is told.
        score: what its clip is judged under.
        negative: what guidance leads away from.
    """

    rollout: Tensor
    score: Tensor
    negative: Tensor

    def to(self, device: torch.device) -> Contexts:
        return Contexts(*(context.to(device) for context in self))


class Data(ABC):
    """A source. What micro-batch `share` of step `index` gets depends on these and its random stream alone.

    Attributes:
        latent_hw: height and width of latents.
    """

    latent_hw: tuple[int, int]

    @abstractmethod
    def teacher_batch(self, index: int, share: int, generator: torch.Generator) -> Batch:
        """Clips for a teacher, clip_frames long."""

    @abstractmethod
    def init_batch(self, index: int, share: int, generator: torch.Generator) -> Batch:
        """Clips for the causal initialisation, init.frames long."""

    @abstractmethod
    def ode_batch(self, index: int, share: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a teacher's sampling passed through, for the causal initialisation instead of clips.

        Returns:
            its states at the student's noise levels [B, 4, F, C, h, w], its ends [B, F, C, h, w], and the
            prompts [B, tokens, text_dim].
        """

    @abstractmethod
    def draw_prompts(self, index: int, share: int, generator: torch.Generator) -> Tensor:
        """Which prompts a distillation step rolls out: int64 [B, ...]."""

    @abstractmethod
    def contexts(self, drawn: Tensor, later: bool) -> Contexts:
        """The prompts that `draw_prompts` chose; `later` where a clip from later in a rollout is judged."""

    def positions(self, frames: int, generator: torch.Generator) -> list[int]:
        """The frame index that each frame of a long rollout is shown as."""
        return list(range(frames))
