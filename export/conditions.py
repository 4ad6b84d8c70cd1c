"""What a pass is told, as parts of their own: of its timestep and of its prompt, computed once each."""

from __future__ import annotations

from math import pi
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.attention import Linear, PromptKeyValue
from export.quantize import Choice
from train.model import Block, WanModel


class TimePart(nn.Module):
    """Timesteps -> all that depends on them, float32 in every engine (it runs once per distinct timestep).

    Rows of the result: shift, scale and gate of self-attention, then of the feed-forward, layer by layer, and
    shift and scale of the head. Scales have their 1 added.

    The reference takes sines of float64 angles. Some targets have no float64, so angles are counted in turns
    and split: the whole part of a timestep times a 13-bit frequency is exact in float32, and so is dropping
    its whole turns; what is left is small. The error against float64 is below 1e-6.
    """

    coarse: Tensor
    fine: Tensor
    turns: Tensor
    own: Tensor
    head: Tensor

    def __init__(self, model: WanModel) -> None:
        super().__init__()
        half = model.config.freq_dim // 2
        turns = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half) / (2 * pi)
        coarse = torch.round(turns * 2**13) / 2**13
        self.register_buffer("turns", turns.float())
        self.register_buffer("coarse", coarse.float())
        self.register_buffer("fine", (turns - coarse).float())
        self.dim = model.config.dim
        self.first, self.last = (
            Linear(model.time_embedding[i], dtype=torch.float32) for i in (0, 2)
        )
        self.projection = Linear(model.time_projection[1], dtype=torch.float32)
        own = torch.cat([cast(Block, block).modulation.detach() for block in model.blocks])
        own[:, [1, 4]] += 1
        head = model.head.modulation.detach()[0].clone()
        head[1] += 1
        self.register_buffer("own", own)
        self.register_buffer("head", head)

    def forward(self, timestep: Tensor) -> Tensor:
        """[1] -> [6 * layers + 2, dim]."""
        t = timestep
        whole = torch.floor(t)
        angle = whole * self.coarse
        angle = angle - torch.floor(angle) + (whole * self.fine + (t - whole) * self.turns)
        angle = angle * (2 * pi)
        features = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
        embedding = self.last(F.silu(self.first(features)))  # [dim]
        shared = self.projection(F.silu(embedding)).view(6, self.dim)
        return torch.cat([(self.own + shared).flatten(0, 1), self.head + embedding])


class PromptPart(nn.Module):
    """Zero-padded context -> cross-attention keys and values of every layer, in the KV dtype."""

    def __init__(self, model: WanModel, dtype: torch.dtype, int8: bool = False) -> None:
        """`int8`: keys and values from int8 weights; their inputs stay as they are."""
        super().__init__()
        self.first, self.last = (Linear(model.text_embedding[i], dtype=dtype) for i in (0, 2))
        self.blocks = nn.ModuleList(
            PromptKeyValue(cast(Block, block).cross_attn, dtype, Choice(int8=int8))
            for block in model.blocks
        )

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        y = self.last(F.gelu(self.first(context), approximate="tanh"))
        return tuple(x for block in self.blocks for x in block(y))
