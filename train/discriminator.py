"""The ASD discriminator: learned queries over a denoiser's features, one logit for a whole clip.

It reads features of a *frozen* backbone (the teacher) instead of sharing the critic's weights: a shared
backbone disturbed the critic in a trial, and the critic is what keeps DMD honest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asd_rt.schedule import MAX_STEPS


class Discriminator(nn.Module):
    """Logit of "comes from n+1 steps" for features of a noised clip.

    One head per feature layer: `queries` learned vectors cross-attend to all tokens of the clip; the step
    count n and the noise level shift the queries.
    """

    def __init__(self, dim: int, layers: int, heads: int = 4, queries: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.steps = nn.Embedding(MAX_STEPS, dim)
        self.sigma = nn.Linear(1, dim)
        self.queries = nn.Parameter(torch.randn(layers, queries, dim) / dim**0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.keys_values = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(layers))
        self.outs = nn.ModuleList(
            nn.Sequential(nn.Linear(queries * dim, dim), nn.SiLU(), nn.Linear(dim, 1))
            for _ in range(layers)
        )

    def forward(self, features: list[Tensor], steps: Tensor, sigma: Tensor) -> Tensor:
        """Features per layer [B, F, S, dim], steps n int64 [B], sigma [B, F] -> logits [B]."""
        condition = self.steps(steps - 1) + self.sigma(sigma.mean(dim=1, keepdim=True))
        logits = torch.zeros(len(steps), device=steps.device)
        for i, feature in enumerate(features):
            x = self.norms[i](feature.flatten(1, 2).float())
            k, v = (
                self.keys_values[i](x)
                .unflatten(-1, (self.heads, -1))
                .transpose(1, 2)
                .chunk(2, dim=-1)
            )
            q = (
                (self.queries[i] + condition[:, None])
                .unflatten(-1, (self.heads, -1))
                .transpose(1, 2)
            )
            attention = F.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
            logits = logits + self.outs[i]((attention @ v).transpose(1, 2).flatten(1))[:, 0]
        return logits
