"""Two modes in one dimension, with an analytic teacher: what DMD alone and DMD+ASD make of one step.

The student is a small flow network that was trained on the mixture. In one step it knows nothing but noise,
so it begins near the mean, on the heavy mode's side; in two steps it shows some of both. Scores are compared
at little noise, where the teacher sees one mode or the other and DMD has no way across.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from train.losses import (
    asd_discriminator_loss,
    asd_generator_loss,
    dmd_gradient,
    dmd_loss,
    finite_difference_penalty,
    flow_matching_loss,
    flow_to_x0,
    noisy_latents,
)

SHARES, CENTRES, SPREAD = (0.7, 0.3), (2.0, -2.0), 0.25
LEVELS = {1: (1.0,), 2: (1.0, 0.5)}
BATCH, WARMUP, STEPS = 256, 50, 300
PLAN = (1, 2)  # steps by turns
LITTLE_NOISE = 0.5


class Network(nn.Module):
    """A flow, or a logit, of columns [B, n]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        )

    def forward(self, *columns: Tensor) -> Tensor:
        wide = [column.expand(len(columns[0]), 1) for column in columns]
        return self.layers(torch.cat(wide, dim=1))


def draw(generator: torch.Generator) -> Tensor:
    return torch.randn(BATCH, 1, generator=generator)


def levels(generator: torch.Generator, highest: float) -> Tensor:
    return 0.02 + (highest - 0.02) * torch.rand(BATCH, generator=generator)


def teacher_x0(x_t: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x_t] under the mixture."""
    a, b = 1 - sigma[:, None], sigma[:, None]
    variance = a**2 * SPREAD**2 + b**2
    logs, means = [], []
    for share, centre in zip(SHARES, CENTRES, strict=True):
        away = x_t - a * centre
        logs.append(math.log(share) - away**2 / (2 * variance) - 0.5 * variance.log())
        means.append(centre + a * SPREAD**2 / variance * away)
    weights = torch.softmax(torch.stack(logs), dim=0)
    return (weights * torch.stack(means)).sum(dim=0)


def roll(student: Network, n: int, noise: list[Tensor], gradient: bool = True) -> Tensor:
    """x0 after n steps, [B, 1]; gradient through the last pass alone."""
    x, plan = noise[0], LEVELS[n]
    for i, level in enumerate(plan):
        with torch.set_grad_enabled(gradient and i + 1 == n):
            sigma = torch.full((len(x),), level)
            x0 = flow_to_x0(student(x, sigma[:, None]), x, sigma)
        if i + 1 < n:
            x = noisy_latents(x0, noise[i + 1], torch.full((len(x),), plan[i + 1]))
    return x0


def trained_flow(steps: int) -> Network:
    """Flow matching on the mixture."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    student = Network(2)
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    for _ in range(steps):
        heavy = torch.rand(BATCH, 1, generator=generator) < SHARES[0]
        x0 = torch.where(heavy, *CENTRES) + SPREAD * draw(generator)
        sigma, noise = torch.rand(BATCH, generator=generator), draw(generator)
        loss = flow_matching_loss(
            student(noisy_latents(x0, noise, sigma), sigma[:, None]), x0, noise
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def adam(network: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr, betas=(0.0, 0.99))


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def distil(start: Network, ratio: float, seed: int = 0) -> Network:
    """DMD with a trained critic; with ASD of weight `ratio` as in train/distill.py, 0 = none."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student, critic, judge = copy.deepcopy(start), copy.deepcopy(start), Network(3)
    optimizers = adam(student, 1e-3), adam(critic, 2e-3), adam(judge, 2e-3)
    for index in range(STEPS):
        n = PLAN[index % len(PLAN)]
        x = roll(student, n, [draw(generator) for _ in range(n)])
        clip = x.detach().requires_grad_()
        sigma, noise = levels(generator, LITTLE_NOISE), draw(generator)
        x_t = noisy_latents(clip, noise, sigma)
        with torch.no_grad():
            fake = flow_to_x0(critic(x_t, sigma[:, None]), x_t, sigma)
            gradient = dmd_gradient(clip[None], fake[None], teacher_x0(x_t, sigma)[None])[0]
        (pull,) = torch.autograd.grad(dmd_loss(clip, gradient), clip)
        column = torch.full((1, 1), float(n))
        use_asd = ratio > 0 and n == 1 and index >= WARMUP
        if use_asd:
            target = roll(student, n + 1, [draw(generator) for _ in range(n + 1)], gradient=False)
            real_t = noisy_latents(target, noise, sigma)
            logits = [
                judge(t, sigma[:, None], column)
                for t in (noisy_latents(clip, noise, sigma), real_t)
            ]
            (push,) = torch.autograd.grad(asd_generator_loss(*logits), clip)
            pull = pull + ratio * pull.norm() / push.norm().clamp_min(1e-12) * push
        update(optimizers[0], (x * pull).sum())
        if use_asd:
            both = [x_t.detach(), real_t]
            shaken = [t + 0.05 * draw(generator) for t in both]
            fake, real, moved_fake, moved_real = (
                judge(t, sigma[:, None], column) for t in (*both, *shaken)
            )
            penalty = finite_difference_penalty(real, moved_real)
            penalty = penalty + finite_difference_penalty(fake, moved_fake)
            update(optimizers[2], asd_discriminator_loss(fake, real) + 0.1 * penalty / 0.05**2)
        for _ in range(3):
            sigma, noise = levels(generator, 0.98), draw(generator)
            flow = critic(noisy_latents(clip.detach(), noise, sigma), sigma[:, None])
            update(optimizers[1], flow_matching_loss(flow, clip.detach(), noise))
    return student


def light_mode(student: Network, n: int) -> float:
    """Share of n-step outputs nearer to the light mode than half way."""
    generator = torch.Generator().manual_seed(99)
    noise = [torch.randn(8192, 1, generator=generator) for _ in range(n)]
    return (roll(student, n, noise, gradient=False) < -1).float().mean().item()


@pytest.fixture(scope="module")
def start() -> Network:
    return trained_flow(1000)


def test_one_step_knows_no_modes_at_first(start: Network) -> None:
    assert light_mode(start, 1) < 0.01
    assert light_mode(start, 2) > 0.03


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_dmd_alone_or_with_a_little_asd_loses_a_mode_at_one_step(
    start: Network, ratio: float
) -> None:
    student = distil(start, ratio)
    assert light_mode(student, 1) < 0.02  # .30 in the data
    assert light_mode(student, 2) > 0.02


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_asd_of_full_weight_hands_it_down_from_two_steps(start: Network, ratio: float) -> None:
    student = distil(start, ratio)
    assert 0.15 < light_mode(student, 1) < 0.5
