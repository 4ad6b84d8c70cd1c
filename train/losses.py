"""Distillation losses as pure functions. Who gets gradients is said in each docstring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted_sigma(u: Tensor, shift: float) -> Tensor:
    """sigma = s*u / (1 + (s-1)*u): noise level of a uniform u in 0..1 (SD3, Wan2.1)."""
    return shift * u / (1 + (shift - 1) * u)


def noise_levels(
    batch: int,
    frames: int,
    group: int,
    mixed: float,
    generator: torch.Generator,
    anchored: float = 0.0,
) -> Tensor:
    """Uniform noise levels u [B, F] in 0..1 before any shift.

    A share `mixed` of the clips has a level of its own for every `group` frames, a quarter of those clean.
    A share `anchored` has one frame, anywhere, that is clean or nearly so among noisy ones: it shows where
    the digit is, and only the prompt tells where it comes from and goes to. The others have one level for
    the whole clip. Noisy frames beside cleaner ones show how frames hang together, and what a direction
    means, long before that can be seen in clips of even noise. Source: Diffusion Forcing.
    """
    groups = (batch, frames // group)
    own = torch.rand(groups, generator=generator)
    own = own * (torch.rand(groups, generator=generator) >= 0.25)
    kind = torch.rand(batch, 1, generator=generator)
    shared = torch.rand(batch, 1, generator=generator)
    levels = torch.where(kind < mixed, own, shared).repeat_interleave(group, dim=1)
    if anchored:
        anchor = 0.5 * torch.rand(batch, 1, generator=generator)
        anchor = anchor * (torch.rand(anchor.shape, generator=generator) < 0.5)
        at = torch.randint(frames, (batch, 1), generator=generator)
        around = shared.clamp_min(0.5).expand(-1, frames).scatter(1, at, anchor)
        levels = torch.where(kind >= 1 - anchored, around, levels)
    return levels


def _broadcast(sigma: Tensor, like: Tensor) -> Tensor:
    return sigma.view(*sigma.shape, *[1] * (like.ndim - sigma.ndim))


def noisy_latents(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) * x0 + sigma * noise; x0 [B, F, C, h, w], sigma [B] or [B, F]."""
    sigma = _broadcast(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def flow_to_x0(flow: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t - sigma * flow, in float64, cast back (Self-Forcing); shapes as in `noisy_latents`."""
    return (x_t.double() - _broadcast(sigma, x_t).double() * flow.double()).to(x_t.dtype)


def flow_matching_loss(flow: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """mean (flow - (noise - x0))^2 in float32; gradient into `flow` alone. Source: Wan2.1, Self-Forcing."""
    return F.mse_loss(flow.float(), (noise - x0).detach().float())


def ode_regression_loss(flow: Tensor, x_t: Tensor, sigma: Tensor, x0: Tensor) -> Tensor:
    """mean (x_t - sigma * flow - x0)^2: find at once where many steps of the teacher led. Source: CausVid."""
    return F.mse_loss(flow_to_x0(flow.float(), x_t.float(), sigma), x0.detach().float())


def guided_x0(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, of x0 or flow alike: uncond + scale * (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def dmd_gradient(x: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """(x0_fake - x0_real) / mean |x - x0_real|, the mean over each clip. No gradients.

    Source: DMD2, Self-Forcing.

    Args:
        x: the student's clip, [B, F, C, h, w].
        x0_fake: the critic's prediction from noised x.
        x0_real: the teacher's guided prediction from the same.
    """
    x, x0_fake, x0_real = x.detach().float(), x0_fake.detach().float(), x0_real.detach().float()
    scale = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return (x0_fake - x0_real) / scale.clamp_min(1e-6)


def dmd_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """0.5 * mean (x - stopgrad(x - gradient))^2: its gradient in x is `gradient` / numel. Source: DMD2."""
    return 0.5 * F.mse_loss(x.float(), (x.float() - gradient).detach())


def asd_generator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """mean softplus(real - fake): pulls n-step logits [B] above (n+1)-step ones; gradient in `fake`.

    Source: relativistic GAN (R3GAN form), ASD paper.
    """
    return F.softplus(real.detach().float() - fake.float()).mean()


def asd_discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """mean softplus(fake - real): the discriminator's side of `asd_generator_loss`; logits [B]."""
    return F.softplus(fake.float() - real.float()).mean()


def finite_difference_penalty(logits: Tensor, perturbed: Tensor) -> Tensor:
    """mean (D(x + eps) - D(x))^2: approximate R1 (on real) or R2 (on fake). Source: APT (Seaweed)."""
    return F.mse_loss(perturbed.float(), logits.float())
