"""Stage "init": the teacher's weights learn to see only the past, by teacher forcing on real clips.

One pass over [clean frames, noisy frames]: clean blocks attend to clean blocks of their window (what the
cache will hold), noisy blocks to the clean blocks before them and to themselves. Sources: CausVid, Self
Forcing ("teacher forcing" variant), Diffusion Forcing for the noise level drawn per block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asd_rt.config import CacheConfig
from asd_rt.kv_cache import attended_frames
from asd_rt.schedule import MAX_STEPS, Schedule
from train.codec import LinearCodec, VocabularyEncoder
from train.config import TrainConfig
from train.losses import flow_matching_loss, noisy_latents, shifted_sigma
from train.model import WanModel, make_rope
from train.muon import MuonAdam
from train.precision import mixed_precision
from train.rollout import attention_mask
from train.stage import Ema, Stage, step_generator, warmup_cosine
from train.teacher import prompt_tokens
from train.tiny_world import PERIOD, TinyWorld


def teacher_forcing_mask(cache: CacheConfig, frames: int, tokens: int) -> Tensor:
    """bool [2 * frames * tokens] squared over [clean, noisy] tokens, True where attended."""
    size = cache.block_frames
    clean = torch.zeros(frames, 2 * frames, dtype=torch.bool)
    for begin in range(0, frames, size):
        clean[begin : begin + size, attended_frames(cache, begin)] = True
        clean[begin : begin + size, begin : begin + size] = True
    clean = clean.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return torch.cat([clean, attention_mask(cache, frames, 0, frames, tokens)])


def jump_after_sinks(cache: CacheConfig, frames: int, generator: torch.Generator) -> list[int]:
    """Frame indices of a clip that leaps ahead after its first block, as if it had played for long.

    The leap is a multiple of the time after which every digit of the tiny world is back where it was, so
    the clip stays true. It teaches the network sinks at any distance. Half of all clips have none.
    """
    leap = int(torch.randint(0, 2, (1,), generator=generator))
    distance = int(2 ** (10 * torch.rand(1, generator=generator).item())) if leap else 0
    first = cache.block_frames
    return [f if f < first else f + PERIOD * distance for f in range(frames)]


class InitStage(Stage):
    """Flow matching with the student's attention; the result is a causal many-step student."""

    name = "init"

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        codec: LinearCodec,
        text: VocabularyEncoder,
        teacher: dict[str, Tensor],
    ) -> None:
        self.config, self.seed, self.codec, self.text = config, seed, codec, text
        self.steps = config.init.steps
        self.model = WanModel(config.model)
        self.model.load_state_dict(teacher)
        self.denoise = torch.compile(self._flow, dynamic=False) if config.compile else self._flow
        self.optimizer = MuonAdam(self.model, config.init.muon_lr, config.init.adam_lr)
        self.ema = Ema(self.model, config.init.ema)
        self.world = TinyWorld("train")
        self.levels = torch.tensor(
            [s.sigma for s in Schedule(config.timestep_shift).steps(MAX_STEPS)]
        )

    def _flow(
        self, x: Tensor, timesteps: Tensor, context: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        time, prompt = self.model.embed_time(timesteps), self.model.embed_prompt(context)
        return self.model.denoise(x, time, prompt, (cos, sin), mask=mask)[0]

    def step(self, index: int) -> dict[str, float]:
        settings, cache = self.config.init, self.config.cache
        generator = step_generator(self.seed, self.name, index)
        positions = jump_after_sinks(cache, settings.frames, generator)
        shown = [f if f == at else f + PERIOD for f, at in enumerate(positions)]
        clips = self.world.draw(settings.batch, shown[-1] + 1, generator)
        x0 = self.codec.encode(clips.frames[:, shown])
        batch, frames, _, height, width = x0.shape
        tokens = prompt_tokens(
            clips,
            self.config.model.text_len,
            self.config.teacher.drop_prompt,
            self.config.teacher.drop_attribute,
            generator,
        )
        # Noise levels a block: half from the student's own steps, half from the whole range.
        shape = (batch, frames // cache.block_frames)
        anywhere = shifted_sigma(torch.rand(shape, generator=generator), self.config.timestep_shift)
        own = self.levels[torch.randint(len(self.levels), shape, generator=generator)]
        use_own = torch.rand(shape, generator=generator) < 0.5
        sigma = torch.where(use_own, own, anywhere).repeat_interleave(cache.block_frames, dim=1)
        noise = torch.randn(x0.shape, generator=generator)
        x = torch.cat([x0, noisy_latents(x0, noise, sigma)], dim=1)
        timesteps = 1000 * torch.cat([torch.zeros_like(sigma), sigma], dim=1)
        cos, sin = make_rope(self.config.model, positions * 2, (height // 2, width // 2))
        mask = teacher_forcing_mask(cache, frames, height * width // 4)
        with mixed_precision():
            flow = self.denoise(x, timesteps, self.text(tokens), cos, sin, mask)
        loss = flow_matching_loss(flow[:, frames:], x0, noise)
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
