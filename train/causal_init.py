"""Stage "init": the teacher's weights learn to see only the past.

One pass over [clean frames, noisy frames]: clean blocks attend to clean blocks of their window (what the
cache will hold), noisy blocks to the clean blocks before them and to themselves. The noisy frames are noised
clips (teacher forcing), or where there are ODE pairs what the teacher's sampling passed through on its way to
the clean ones. Sources: CausVid (ODE pairs), Self Forcing ("teacher forcing" variant), Diffusion Forcing for
the noise level drawn per block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from asd_rt.config import CacheConfig
from asd_rt.kv_cache import attended_frames
from asd_rt.schedule import MAX_STEPS, Schedule
from train.compiled import compiled
from train.config import TrainConfig
from train.data import Data
from train.losses import (
    flow_matching_loss,
    noisy_latents,
    ode_regression_loss,
    shifted_sigma,
)
from train.model import WanModel, make_rope
from train.muon import MuonAdam
from train.optimizers import Ema, warmup_cosine
from train.parallel import SINGLE, Parallel
from train.rollout import attention_mask
from train.stage import Stage, step_generator


def teacher_forcing_mask(cache: CacheConfig, frames: int, tokens: int) -> Tensor:
    """bool [2 * frames * tokens] squared over [clean, noisy] tokens, True where attended."""
    size = cache.block_frames
    clean = torch.zeros(frames, 2 * frames, dtype=torch.bool)
    for begin in range(0, frames, size):
        clean[begin : begin + size, attended_frames(cache, begin)] = True
        clean[begin : begin + size, begin : begin + size] = True
    clean = clean.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return torch.cat([clean, attention_mask(cache, frames, 0, frames, tokens)])


class _Example(NamedTuple):
    """What a pass sees and is to find: x_t at sigma [B, F] made of x0, with `noise` or by the teacher."""

    x0: Tensor
    x_t: Tensor
    sigma: Tensor
    noise: Tensor | None
    context: Tensor
    positions: list[int]


class InitStage(Stage):
    """Flow matching, or ODE regression, with the student's attention; the result is a causal student."""

    name = "init"

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        data: Data,
        network: WanModel,
        parallel: Parallel = SINGLE,
    ) -> None:
        self.config, self.seed, self.data, self.parallel = config, seed, data, parallel
        self.steps = config.init.steps
        self.model = network
        self.denoise = compiled(self._flow, config, parallel)
        self.optimizer = MuonAdam(network, config.init.muon_lr, config.init.adam_lr)
        self.ema = Ema(network, config.init.ema)
        self.levels = torch.tensor(
            [s.sigma for s in Schedule(config.timestep_shift).steps(MAX_STEPS)]
        )

    def _flow(
        self, x: Tensor, timesteps: Tensor, context: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> Tensor:
        time, prompt = self.model.embed_time(timesteps), self.model.embed_prompt(context)
        return self.model.denoise(x, time, prompt, (cos, sin), mask=mask)[0]

    def _forced(self, index: int, share: int, generator: torch.Generator) -> _Example:
        """A noised clip. Noise levels a block: half from the student's own steps, half from anywhere."""
        size = self.config.cache.block_frames
        x0, context, positions = self.data.init_batch(index, share, generator)
        shape = (len(x0), x0.shape[1] // size)
        anywhere = shifted_sigma(torch.rand(shape, generator=generator), self.config.timestep_shift)
        own = self.levels[torch.randint(len(self.levels), shape, generator=generator)]
        use_own = torch.rand(shape, generator=generator) < 0.5
        sigma = torch.where(use_own, own, anywhere).repeat_interleave(size, dim=1)
        noise = torch.randn(x0.shape, generator=generator)
        return _Example(x0, noisy_latents(x0, noise, sigma), sigma, noise, context, positions)

    def _sampled(self, index: int, share: int, generator: torch.Generator) -> _Example:
        """What the teacher passed through at the student's own steps, one of them a block."""
        size = self.config.cache.block_frames
        path, x0, context = self.data.ode_batch(index, share)
        batch, frames = x0.shape[:2]
        step = torch.randint(MAX_STEPS, (batch, frames // size), generator=generator)
        step = step.repeat_interleave(size, dim=1)
        rows, columns = torch.arange(batch)[:, None], torch.arange(frames)
        x_t = path[rows, step, columns]
        return _Example(x0, x_t, self.levels[step], None, context, list(range(frames)))

    def _loss(self, example: _Example) -> Tensor:
        device = self.parallel.device
        x0, x_t, sigma = (t.to(device) for t in example[:3])
        frames, height, width = x0.shape[1], *x0.shape[3:]
        timesteps = 1000 * torch.cat([torch.zeros_like(sigma), sigma], dim=1)
        token_hw = (height // 2, width // 2)
        cos, sin = make_rope(self.model.config, example.positions * 2, token_hw, device)
        mask = teacher_forcing_mask(self.config.cache, frames, token_hw[0] * token_hw[1])
        x = torch.cat([x0, x_t], dim=1)
        with self.parallel.autocast():
            flow = self.denoise(x, timesteps, example.context.to(device), cos, sin, mask.to(device))
        flow = flow[:, frames:]
        if example.noise is None:
            return ode_regression_loss(flow, x_t, sigma, x0)
        return flow_matching_loss(flow, x0, example.noise.to(device))

    def step(self, index: int) -> dict[str, float]:
        settings, shares = self.config.init, self.parallel.shares
        example = self._sampled if self.config.data and self.config.data.ode_pairs else self._forced
        losses = []
        for share in shares:
            generator = step_generator(self.seed, self.name, index, share)
            loss = self._loss(example(index, share, generator))
            (loss / len(shares)).backward()
            losses.append(loss.detach())
        norm = self.parallel.clip(self.model, 1.0)
        self.optimizer.step(warmup_cosine(index, self.steps, settings.warmup))
        self.ema.update(self.model, min(settings.ema, (1 + index) / (10 + index)))
        return self.parallel.average({"loss": torch.stack(losses).mean(), "grad_norm": norm})

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
