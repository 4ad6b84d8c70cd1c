"""What teacher, critic and discriminator say of a clip, and the networks of a distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from asd_rt.config import ModelConfig
from train.config import TrainConfig
from train.data import Contexts
from train.discriminator import Discriminator
from train.losses import (
    dmd_gradient,
    finite_difference_penalty,
    flow_to_x0,
    guided_x0,
    noise_levels,
    shifted_sigma,
)
from train.model import WanModel, clip_rope


@dataclass(frozen=True, slots=True)
class Networks:
    """All that a distillation runs; the teacher is frozen, and may be larger than the others."""

    student: WanModel
    critic: WanModel
    discriminator: Discriminator
    teacher: WanModel


@dataclass(frozen=True, slots=True)
class Pair:
    """An n-step clip ("fake") beside an (n+1)-step one ("real"), noised alike, as the teacher sees them."""

    fake_t: Tensor
    real_t: Tensor
    fake: list[Tensor]
    real: list[Tensor]
    sigma: Tensor
    steps: Tensor


def feature_layers(layers: int) -> list[int]:
    """Which of a teacher's layers the discriminator reads: one in the middle, and the last."""
    return sorted({layers // 2 - 1, layers - 1} & set(range(layers)))


def start_networks(
    config: ModelConfig, seed: int, teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]
) -> Networks:
    """Networks of one shape on the CPU; the critic is the teacher at first."""
    torch.manual_seed(seed)
    models = [WanModel(config) for _ in range(3)]
    for model, weights in zip(models, (teacher, teacher, student), strict=True):
        model.load_state_dict(weights)
    discriminator = Discriminator(config.dim, len(feature_layers(config.num_layers)))
    return Networks(models[2], models[1], discriminator, models[0])


def predict(
    model: WanModel, x_t: Tensor, sigma: Tensor, context: Tensor, features: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """A bidirectional pass at noise levels [B, F].

    Returns:
        flow float32 [B, F, C, h, w], and the discriminator's features if they are asked for.
    """
    collected: list[Tensor] = []
    flow, _ = model.denoise(
        x_t,
        model.embed_time(1000 * sigma),
        model.embed_prompt(context),
        clip_rope(model.config, x_t),
        features=collected if features else None,
    )
    layers = feature_layers(model.config.num_layers)
    return flow.float(), [collected[i] for i in layers] if features else []


def score_levels(config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Noise levels [B, F] at which scores are compared: 0.02..0.98, or 0 for clean frames."""
    settings = config.distill
    u = noise_levels(
        settings.batch,
        config.clip_frames,
        config.cache.block_frames,
        settings.mixed_noise,
        generator,
        settings.anchored_noise,
    )
    sigma = shifted_sigma(u, config.timestep_shift)
    return torch.where(sigma > 0, sigma.clamp(0.02, 0.98), sigma)


@torch.no_grad()
def teacher_gradient(
    networks: Networks,
    x: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    contexts: Contexts,
    cond: Tensor,
    guidance: float,
) -> Tensor:
    """The DMD gradient of clips x [B, F, C, h, w], noised to x_t, whose flow by the teacher is `cond`."""
    uncond, _ = predict(networks.teacher, x_t, sigma, contexts.negative)
    fake, _ = predict(networks.critic, x_t, sigma, contexts.score)
    flow = guided_x0(cond, uncond, guidance)
    return dmd_gradient(x, flow_to_x0(fake, x_t, sigma), flow_to_x0(flow, x_t, sigma))


def read_pair(
    networks: Networks,
    fake_t: Tensor,
    fake: list[Tensor],
    real_t: Tensor,
    sigma: Tensor,
    context: Tensor,
    n: int,
) -> Pair:
    """An n-step clip with the teacher's features `fake` of it, and an (n+1)-step clip, both noised."""
    with torch.no_grad():
        _, real = predict(networks.teacher, real_t, sigma, context, features=True)
    steps = torch.full((len(sigma),), n, device=sigma.device)
    return Pair(fake_t.detach(), real_t, fake, real, sigma, steps)


@torch.no_grad()
def read_shaken(networks: Networks, pair: Pair, shake: Tensor, context: Tensor) -> list[Tensor]:
    """The teacher's features of a pair after `shake` [2 B, F, C, h, w] was added to its two clips."""
    shaken = torch.cat([pair.fake_t, pair.real_t]) + shake
    sigma, context = pair.sigma.repeat(2, 1), context.repeat(2, 1, 1)
    return predict(networks.teacher, shaken, sigma, context, features=True)[1]


def pair_logits(
    discriminator: Discriminator, pair: Pair, moved: list[Tensor]
) -> tuple[Tensor, ...]:
    """Logits [B] of fake, real, fake shaken and real shaken; gradients reach the discriminator alone."""
    features = [
        torch.cat([fake.detach(), real, both])
        for fake, real, both in zip(pair.fake, pair.real, moved, strict=True)
    ]
    sigma = pair.sigma.repeat(4, 1)
    return discriminator(features, pair.steps.repeat(4), sigma).chunk(4)


def shake_penalty(logits: tuple[Tensor, ...], r1: float, r2: float) -> Tensor:
    """Approximate R1 (weight `r1`, on real) and R2 (on fake): how far logits move when clips are shaken."""
    fake, real, fake_shaken, real_shaken = logits
    penalty = r1 * finite_difference_penalty(real, real_shaken)
    return penalty + r2 * finite_difference_penalty(fake, fake_shaken)
