"""The network as flat tensors-in / tensors-out modules (docs/engine.md), in the precision of one engine.

`train.model` stays the definition; these modules are its lowering: weights laid out for plain matrix
products, no float64, and explicit casts, so that the exported graph is strongly typed. In fp16, matrix
products and attention are float16; norms, rotary positions, modulation, gates and the residual stream are
float32. `export.parity` measures every part against `train.model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model import Attention, Block, WanModel


class Linear(nn.Module):
    """x @ W + b in `dtype`; the weight is stored as [in, out], so the graph needs no transposition."""

    def __init__(self, source: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        source = cast(nn.Linear, source)
        self.dtype = dtype
        self.weight = nn.Parameter(source.weight.detach().t().contiguous().to(dtype))
        self.bias = nn.Parameter(source.bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) @ self.weight + self.bias


class RmsNorm(nn.Module):
    """x / rms(x) * weight over all channels: any float in, float32 out."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.detach()), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


class AttentionPart(nn.Module):
    """Query, and optionally key and value projections of one attention, and its output projection."""

    def __init__(self, source: Attention, dtype: torch.dtype, own_keys: bool) -> None:
        super().__init__()
        self.heads, self.dtype = source.heads, dtype
        self.q, self.o = Linear(source.q, dtype), Linear(source.o, dtype)
        self.norm_q = RmsNorm(source.norm_q.weight, source.norm_q.eps)
        if own_keys:
            self.keys = KeyValuePart(source, dtype)

    def queries(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> float32 [B, T, heads, head_dim]."""
        return split_heads(self.norm_q(self.q(x)), self.heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, heads, D] over k, v [S, B, heads, D] -> projected [B, T, dim]."""
        q, k, v = q.to(self.dtype).transpose(1, 2), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected


class KeyValuePart(nn.Module):
    """Keys (normalised, not turned) and values: [B, T, dim] -> each [B, T, heads, head_dim]."""

    def __init__(self, source: Attention, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = source.heads
        self.k, self.v = Linear(source.k, dtype), Linear(source.v, dtype)
        self.norm_k = RmsNorm(source.norm_k.weight, source.norm_k.eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys are float32, values of the part's dtype."""
        return split_heads(self.norm_k(self.k(x)), self.heads), split_heads(self.v(x), self.heads)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, dim] -> [B, T, heads, dim / heads]."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved channel pairs of float32 x [B, T, heads, D] by tables [T, 1, D / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class BlockPart(nn.Module):
    """One transformer block; the residual stream x [B, F, S, dim] is float32 throughout."""

    def __init__(self, source: Block, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.dtype = source.eps, dtype
        self.modulation = nn.Parameter(source.modulation.detach())
        self.self_attn = AttentionPart(source.self_attn, dtype, own_keys=True)
        self.cross_attn = AttentionPart(source.cross_attn, dtype, own_keys=False)
        self.norm3 = source.norm3
        self.up, self.down = (Linear(source.ffn[i], dtype) for i in (0, 2))

    def norm(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        prompt: Sequence[Tensor],
        past: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (x, this pass's keys, values), the latter two [T, B, heads, head_dim] in the KV dtype."""
        shape = x.shape
        m = [part.unsqueeze(2) for part in (modulation + self.modulation).unbind(dim=2)]

        attn = self.self_attn
        y = self.norm(x, m[0], m[1]).flatten(1, 2)
        keys, values = attn.keys(y)
        k, v = turn(keys, *rope).to(self.dtype).transpose(0, 1), values.transpose(0, 1)
        q = turn(attn.queries(y), *rope)
        out = attn.attend(q, torch.cat([past[0], k]), torch.cat([past[1], v]))
        x = x + out.float().view(shape) * m[2]

        y = self.norm3(x).flatten(1, 2)
        x = x + self.cross_attn.attend(self.cross_attn.queries(y), *prompt).float().view(shape)
        y = F.gelu(self.up(self.norm(x, m[3], m[4])), approximate="tanh")
        return x + self.down(y).float() * m[5], k, v


class DenoiserPart(nn.Module):
    """One causal pass, as in docs/engine.md; prompt and past come layer by layer, k before v."""

    def __init__(self, model: WanModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = model.config.num_layers
        patch = model.patch_embedding
        linear = nn.Linear(patch.in_channels * 4, patch.out_channels, device="meta")
        values = {"weight": patch.weight.flatten(1), "bias": cast(Tensor, patch.bias)}
        linear.load_state_dict(values, assign=True)
        self.patch = Linear(linear, torch.float32)  # small, and where the latents come in unharmed
        self.blocks = nn.ModuleList(BlockPart(cast(Block, block), dtype) for block in model.blocks)
        self.eps = model.config.eps
        self.modulation = nn.Parameter(model.head.modulation.detach())
        self.head = Linear(model.head.head, torch.float32)

    def forward(
        self,
        latents: Tensor,
        time_embedding: Tensor,
        time_modulation: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        *layers: Tensor,
    ) -> tuple[Tensor, ...]:
        prompt, past = layers[: 2 * self.layers], layers[2 * self.layers :]
        batch, frames, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        x = latents.reshape(batch, frames, channels, rows, 2, columns, 2).permute(
            0, 1, 3, 5, 2, 4, 6
        )
        x = self.patch(x.reshape(batch, frames, rows * columns, channels * 4))
        rope = rope_cos.unsqueeze(1), rope_sin.unsqueeze(1)
        new: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            pair = slice(2 * i, 2 * i + 2)
            x, k, v = block(x, time_modulation, rope, prompt[pair], past[pair])
            new += [k, v]
        shift, scale = (self.modulation + time_embedding.unsqueeze(2)).chunk(2, dim=2)
        x = self.head(F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift)
        x = x.view(batch, frames, rows, columns, 2, 2, -1).permute(0, 1, 6, 2, 4, 3, 5)
        return x.reshape(batch, frames, -1, height, width), *new


class TimePart(nn.Module):
    """Timesteps -> embedding and modulation, float32 in every engine (it runs once per distinct timestep).

    The reference takes sines of float64 angles. Some targets have no float64, so angles are counted in turns
    and split: the whole part of a timestep times a 13-bit frequency is exact in float32, and so is dropping
    its whole turns; what is left is small. The error against float64 is below 1e-6.
    """

    coarse: Tensor
    fine: Tensor
    turns: Tensor

    def __init__(self, model: WanModel) -> None:
        super().__init__()
        half = model.config.freq_dim // 2
        turns = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half) / (2 * pi)
        coarse = torch.round(turns * 2**13) / 2**13
        self.register_buffer("turns", turns.float())
        self.register_buffer("coarse", coarse.float())
        self.register_buffer("fine", (turns - coarse).float())
        self.dim = model.config.dim
        first, last = model.time_embedding[0], model.time_embedding[2]
        self.first, self.last = Linear(first, torch.float32), Linear(last, torch.float32)
        self.projection = Linear(model.time_projection[1], torch.float32)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        t = timesteps.unsqueeze(-1)
        whole = torch.floor(t)
        angle = whole * self.coarse
        angle = angle - torch.floor(angle) + (whole * self.fine + (t - whole) * self.turns)
        angle = angle * (2 * pi)
        features = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
        embedding = self.last(F.silu(self.first(features)))
        return embedding, self.projection(F.silu(embedding)).unflatten(-1, (6, self.dim))


class PromptPart(nn.Module):
    """Zero-padded context -> cross-attention keys and values of every layer, in the KV dtype."""

    def __init__(self, model: WanModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.first, self.last = (Linear(model.text_embedding[i], dtype) for i in (0, 2))
        self.blocks = nn.ModuleList(
            KeyValuePart(cast(Block, block).cross_attn, dtype) for block in model.blocks
        )

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        y = self.last(F.gelu(self.first(context), approximate="tanh"))
        new: list[Tensor] = []
        for block in self.blocks:
            k, v = block(y)
            new += [k.to(self.dtype).transpose(0, 1), v.transpose(0, 1)]
        return tuple(new)
