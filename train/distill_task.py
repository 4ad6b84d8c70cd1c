"""What a distillation step trains, and each micro-batch's part in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asd_rt.schedule import MAX_STEPS
from train.config import TrainConfig
from train.data import Contexts, Data
from train.stage import step_generator


@dataclass(frozen=True, slots=True)
class Task:
    """What is the same for all micro-batches of a step: length and steps of the rollout, what is judged.

    Attributes:
        n: denoising steps of a block.
        enhanced: the first block gets all 4 (First-Frame Enhancement).
        use_asd: whether the (n+1)-step rollout pulls too.
        positions: the frame index that each frame is shown as; the rollout ends with the judged clip.
        first: the frame that the judged clip begins with.
        block_frames: frames of a block.
    """

    n: int
    enhanced: bool
    use_asd: bool
    positions: list[int]
    first: int
    block_frames: int

    def plan(self, steps: int) -> list[int]:
        """Denoising steps of each block."""
        blocks = len(self.positions) // self.block_frames
        return [MAX_STEPS if self.enhanced else steps] + [steps] * (blocks - 1)


@dataclass(frozen=True, slots=True)
class Share:
    """One micro-batch: its number, prompts and random stream."""

    number: int
    contexts: Contexts
    generator: torch.Generator

    def noise(self, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
        """Gaussian noise; it is drawn on the CPU, so that it is the same on any machine."""
        if device.type == "meta":
            return torch.empty(shape, device=device)
        return torch.randn(shape, generator=self.generator).to(device)


def draw_step(
    config: TrainConfig, data: Data, seed: int, stage: str, index: int, shares: range
) -> tuple[Task, list[Share]]:
    """Step `index`, and those of its micro-batches that this process computes.

    The task is drawn from the stream of the first micro-batch, by all processes alike: they must run the same
    passes.
    """
    settings, cache = config.distill, config.cache
    generator = step_generator(seed, stage, index)

    def chance() -> float:
        return torch.rand(1, generator=generator).item()

    weights = torch.tensor(settings.step_weights, dtype=torch.float32)
    n = 1 + int(torch.multinomial(weights, 1, generator=generator))
    prompts = data.draw_prompts(index, 0, generator)
    enhanced = n < MAX_STEPS and chance() < settings.first_steps_share
    # Most rollouts are one clip long; the others run on, so that window and sinks are trained too.
    window = config.clip_frames
    long = settings.frames > window and chance() < settings.long_share
    frames = settings.frames if long else window
    positions, first = list(range(frames)), 0
    if long:
        positions = data.positions(frames, generator)
        earliest = cache.block_frames if positions[-1] >= frames else 0
        choices = range(earliest, frames - window + 1, cache.block_frames)
        first = choices[int(torch.randint(len(choices), (1,), generator=generator))]
        positions = positions[: first + window]  # what comes later is not judged
    task = Task(
        n=n,
        enhanced=enhanced,
        use_asd=n < MAX_STEPS and settings.asd_ratio > 0 and index >= settings.asd_warmup,
        positions=positions,
        first=first,
        block_frames=cache.block_frames,
    )
    mine = []
    for number in shares:
        stream, drawn = generator, prompts
        if number:
            stream = step_generator(seed, stage, index, number)
            drawn = data.draw_prompts(index, number, stream)
        mine.append(Share(number, data.contexts(drawn, first > 0), stream))
    return task, mine
