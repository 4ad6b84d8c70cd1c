"""The tiny world as a source of clips and prompts: everything is drawn anew, nothing is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from asd_rt.config import CacheConfig
from asd_rt.errors import ConfigError
from train.codec import LATENT_HW, LinearCodec, VocabularyEncoder
from train.config import TrainConfig
from train.data import Batch, Contexts, Data
from train.tiny_world import (
    NEGATIVE_NAMES,
    PERIOD,
    Clips,
    TinyWorld,
    label_tokens,
    random_labels,
)


def prompt_tokens(
    clips: Clips,
    text_len: int,
    drop_prompt: float,
    drop_attribute: float,
    generator: torch.Generator,
    later: Tensor | None = None,
) -> Tensor:
    """Token ids of the clips' prompts with whole prompts and single attributes left out at random.

    Clips marked in `later` [B] never name a direction: they show some later stretch, and by then a digit
    may have turned round.
    """
    labels = torch.stack([clips.digit, clips.colour, clips.direction], dim=1)
    keep = torch.rand(labels.shape, generator=generator) >= drop_attribute
    keep &= torch.rand(len(labels), 1, generator=generator) >= drop_prompt
    if later is not None:
        keep[:, 2] &= ~later
    return label_tokens(labels, text_len, keep)


def jump_after_sinks(cache: CacheConfig, frames: int, generator: torch.Generator) -> list[int]:
    """Frame indices of a clip that leaps ahead after its first block, as if it had played for long.

    The leap is a multiple of the time after which every digit of the tiny world is back where it was, so
    the clip stays true. It teaches the network sinks at any distance. Half of all clips have none.
    """
    leap = int(torch.randint(0, 2, (1,), generator=generator))
    distance = int(2 ** (10 * torch.rand(1, generator=generator).item())) if leap else 0
    first = cache.block_frames
    return [f if f < first else f + PERIOD * distance for f in range(frames)]


class TinyData(Data):
    """Digits on their way, and what to say of them."""

    latent_hw = LATENT_HW

    def __init__(self, config: TrainConfig, codec: LinearCodec, text: VocabularyEncoder) -> None:
        self.config, self.codec, self.text = config, codec, text
        self.world = TinyWorld("train")

    def teacher_batch(self, index: int, share: int, generator: torch.Generator) -> Batch:
        settings, frames = self.config.teacher, self.config.clip_frames
        later = torch.rand(settings.batch, generator=generator) < settings.later_share
        begin = later * torch.randint(PERIOD, (settings.batch,), generator=generator)
        clips = self.world.draw(settings.batch, frames, generator, begin=begin)
        tokens = self._tokens(clips, generator, later)
        return Batch(self.codec.encode(clips.frames), self.text(tokens), list(range(frames)))

    def init_batch(self, index: int, share: int, generator: torch.Generator) -> Batch:
        settings = self.config.init
        positions = self.positions(settings.frames, generator)
        shown = [f if f == at else f + PERIOD for f, at in enumerate(positions)]
        clips = self.world.draw(settings.batch, shown[-1] + 1, generator)
        tokens = self._tokens(clips, generator)
        return Batch(self.codec.encode(clips.frames[:, shown]), self.text(tokens), positions)

    def ode_batch(self, index: int, share: int) -> tuple[Tensor, Tensor, Tensor]:
        raise ConfigError("data.ode_pairs: the tiny world has clips without end, and no pairs")

    def _tokens(
        self, clips: Clips, generator: torch.Generator, later: Tensor | None = None
    ) -> Tensor:
        dropped = self.config.teacher.drop_prompt, self.config.teacher.drop_attribute
        return prompt_tokens(clips, self.config.model.text_len, *dropped, generator, later)

    def draw_prompts(self, index: int, share: int, generator: torch.Generator) -> Tensor:
        return random_labels(self.config.distill.batch, generator)

    def contexts(self, drawn: Tensor, later: bool) -> Contexts:
        text_len = self.config.model.text_len
        # Later in its life a digit may have turned round: its clip is judged without the direction.
        named = torch.tensor([[True, True, not later]]).expand(len(drawn), -1)
        negative = named & torch.tensor(NEGATIVE_NAMES)
        return Contexts(
            self.text(label_tokens(drawn, text_len)),
            self.text(label_tokens(drawn, text_len, named)),
            self.text(label_tokens(drawn, text_len, negative)),
        )

    def positions(self, frames: int, generator: torch.Generator) -> list[int]:
        return jump_after_sinks(self.config.cache, frames, generator)
