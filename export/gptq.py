"""Rounding of weights that makes up for itself: what an input's weights lose, those of later ones give back.

Source: GPTQ (arXiv 2210.17323), with inputs in the order of their size. An engine is no slower for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST = 2048  # inputs of a layer: of more, a covariance takes as much memory as the network
DAMPING = 0.01  # of the mean variance, added to all: inputs of a rollout may be too few, or alike
ROWS = 128  # rounded one by one before the others are corrected at once


def observe(covariance: Tensor | None, x: Tensor) -> Tensor | None:
    """Add inputs x [..., in] to a covariance (float32 [in, in], sums); None where they are too many."""
    x = x.flatten(0, -2)
    if x.shape[-1] > WIDEST:
        return None
    product = x.t() @ x
    return product if covariance is None else covariance.add_(product)


def round_compensated(weight: Tensor, scale: Tensor, covariance: Tensor, largest: int) -> Tensor:
    """Round a weight so that products with such inputs come out best, not the weight itself.

    Args:
        weight: float32 [in, out].
        scale: float32 [out], of a step.
        covariance: [in, in] of the inputs.
        largest: number of steps.

    Returns:
        steps, float32 [in, out] of whole numbers in -largest..largest.
    """
    order = covariance.diagonal().argsort(descending=True, stable=True)
    ordered = covariance[order][:, order].double()
    ordered.diagonal().add_(DAMPING * float(ordered.diagonal().mean()) or 1.0)
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True
    ).float()
    left, steps = weight[order], torch.empty_like(weight)
    for begin in range(0, len(left), ROWS):
        rows, lost = left[begin : begin + ROWS], []
        end = begin + len(rows)
        within = factor[begin:end, begin:end]
        for i, row in enumerate(rows):
            rounded = torch.round(row / scale).clamp(-largest, largest)
            steps[order[begin + i]] = rounded
            lost.append((row - rounded * scale) / within[i, i])
            rows[i + 1 :] -= within[i, i + 1 :, None] * lost[-1]
        left[end:] -= factor[begin:end, end:].t() @ torch.stack(lost)
    return steps
