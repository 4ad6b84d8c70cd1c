"""Stage "teacher": a bidirectional denoiser of whole clips, trained by flow matching on real clips."""

from __future__ import annotations

from typing import Any

import torch

from train.compiled import compiled
from train.config import TrainConfig
from train.data import Data
from train.losses import flow_matching_loss, noise_levels, noisy_latents, shifted_sigma
from train.model import WanModel, clip_rope
from train.muon import MuonAdam
from train.optimizers import Ema, warmup_cosine
from train.parallel import SINGLE, Parallel
from train.stage import Stage, step_generator


class TeacherStage(Stage):
    """Flow matching; noise levels are drawn a clip, a block or a frame, uniform and shifted towards noise."""

    name = "teacher"

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        data: Data,
        network: WanModel,
        parallel: Parallel = SINGLE,
    ) -> None:
        self.config, self.seed, self.data, self.parallel = config, seed, data, parallel
        self.steps = config.teacher.steps
        self.model = network
        self.forward = compiled(network, config, parallel)
        self.optimizer = MuonAdam(network, config.teacher.muon_lr, config.teacher.adam_lr)
        self.ema = Ema(network, config.teacher.ema)

    def step(self, index: int) -> dict[str, float]:
        settings, device, shares = self.config.teacher, self.parallel.device, self.parallel.shares
        losses = []
        for share in shares:
            generator = step_generator(self.seed, self.name, index, share)
            x0, context, _ = self.data.teacher_batch(index, share, generator)
            group = 1 if index % 2 else self.config.cache.block_frames
            u = noise_levels(
                settings.batch,
                x0.shape[1],
                group,
                settings.mixed_noise,
                generator,
                settings.anchored_noise,
            )
            sigma = shifted_sigma(u, settings.shift).to(device)
            noise = torch.randn(x0.shape, generator=generator).to(device)
            x0 = x0.to(device)
            with self.parallel.autocast():
                x_t = noisy_latents(x0, noise, sigma)
                rope = clip_rope(self.model.config, x_t)
                flow = self.forward(x_t, 1000 * sigma, context.to(device), rope)
            loss = flow_matching_loss(flow, x0, noise)
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
