"""Stage "teacher": a bidirectional denoiser of whole clips, trained by flow matching on real clips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.codec import LinearCodec, VocabularyEncoder
from train.config import TrainConfig
from train.losses import flow_matching_loss, noise_levels, noisy_latents, shifted_sigma
from train.model import WanModel
from train.muon import MuonAdam
from train.precision import mixed_precision
from train.stage import Ema, Stage, step_generator, warmup_cosine
from train.tiny_world import PERIOD, Clips, TinyWorld, label_tokens


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


class TeacherStage(Stage):
    """Flow matching; noise levels are drawn a clip, a block or a frame, uniform and shifted towards noise."""

    name = "teacher"

    def __init__(
        self, config: TrainConfig, seed: int, codec: LinearCodec, text: VocabularyEncoder
    ) -> None:
        self.config, self.seed, self.codec, self.text = config, seed, codec, text
        self.steps = config.teacher.steps
        torch.manual_seed(seed)
        self.model = WanModel(config.model)
        self.forward = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.optimizer = MuonAdam(self.model, config.teacher.muon_lr, config.teacher.adam_lr)
        self.ema = Ema(self.model, config.teacher.ema)
        self.world = TinyWorld("train")

    def step(self, index: int) -> dict[str, float]:
        settings = self.config.teacher
        generator = step_generator(self.seed, self.name, index)
        later = torch.rand(settings.batch, generator=generator) < settings.later_share
        begin = later * torch.randint(PERIOD, (settings.batch,), generator=generator)
        clips = self.world.draw(settings.batch, self.config.clip_frames, generator, begin=begin)
        x0 = self.codec.encode(clips.frames)
        tokens = prompt_tokens(
            clips,
            self.config.model.text_len,
            settings.drop_prompt,
            settings.drop_attribute,
            generator,
            later,
        )
        group = 1 if index % 2 else self.config.cache.block_frames
        u = noise_levels(
            settings.batch,
            x0.shape[1],
            group,
            settings.mixed_noise,
            generator,
            settings.anchored_noise,
        )
        sigma = shifted_sigma(u, settings.shift)
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = 1000 * sigma
        with mixed_precision():
            flow = self.forward(noisy_latents(x0, noise, sigma), timesteps, self.text(tokens))
        loss = flow_matching_loss(flow, x0, noise)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(warmup_cosine(index, self.steps, settings.warmup))
        self.ema.update(self.model, min(settings.ema, (1 + index) / (10 + index)))
        return {"loss": loss.item(), "grad_norm": norm.item()}

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.values,
            "optimizer": self.optimizer.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.values = state["ema"]
        self.optimizer.load(state["optimizer"])
