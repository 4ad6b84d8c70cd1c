"""Distillation losses as pure functions. Who gets gradients is said in each docstring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted_sigma(u: Tensor, shift: float) -> Tensor:
    """sigma = s*u / (1 + (s-1)*u): noise level of a uniform u in 0..1 (SD3, Wan2.1)."""
    return shift * u / (1 + (shift - 1) * u)


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
    """mean (flow - (noise - x0))^2 in float32; gradient into `flow` alone. Source: Wan2.1, Self-Forcing critic."""
    return F.mse_loss(flow.float(), (noise - x0).detach().float())
