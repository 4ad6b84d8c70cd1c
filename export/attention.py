"""Products, norms and attention of the lowered network, as `export.denoiser` puts them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import ops

from export.lowering import Lowering
from export.quantize import PLAIN, Choice, Quantized, QuantizedInput
from train.model import Attention

Choices = Mapping[str, Choice]  # of one block, by the names in LAYERS
MASKED = -1e4  # weighs nothing after softmax, and is a number in float16


class Linear(nn.Module):
    """x @ W + b in `dtype`, for all `sources` side by side; W is [in, out]: the graph transposes nothing."""

    def __init__(self, *sources: nn.Module, dtype: torch.dtype, choice: Choice = PLAIN) -> None:
        """`choice`: how it is computed, where it is not simply in `dtype`."""
        super().__init__()
        layers = [cast(nn.Linear, source) for source in sources]
        self.dtype = dtype = torch.float32 if choice.wide else dtype
        # A view where it can be one: a large network must not be in memory twice.
        whole = layers[0].weight if len(layers) == 1 else torch.cat([y.weight for y in layers])
        weight = whole.detach().t()
        self.weight: Quantized | nn.Parameter
        if choice.int8:
            self.weight = Quantized(weight, dtype, choice)
        else:
            if choice.divisor is not None:
                weight = weight * choice.divisor[:, None]
            self.weight = nn.Parameter(weight.to(dtype))
        self.input: QuantizedInput | None = None
        if choice.input_scale is not None:
            self.input = QuantizedInput(choice.input_scale, dtype, choice.form)
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(self.dtype)
        if self.input is not None:
            y = self.input(y)
        weight = self.weight() if isinstance(self.weight, Quantized) else self.weight
        product: Tensor = y @ weight
        return product + self.bias


class RmsNorm(nn.Module):
    """x / rms(x) * weight over all channels: any float in, float32 out."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.detach()), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[1, T, dim] -> [1, T, heads, dim / heads]."""
    return x.view(x.shape[0], -1, heads, x.shape[-1] // heads)


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, how: Lowering, mask: Tensor | None = None
) -> Tensor:
    """q [1, T, dim] over k, v [1, S, dim], by mask bool [T, S] where there is one -> [1, T, dim]."""
    if how.attention == "operator":
        return ops.attention(q, k, v, mask, q_num_heads=heads, kv_num_heads=heads)[0]
    q, k, v = (split_heads(x, heads).transpose(1, 2) for x in (q, k, v))
    if how.attention == "torch":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, MASKED)
    out: Tensor = scores.softmax(dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


def turn(x: Tensor, rope: tuple[Tensor, Tensor], heads: int, fused: bool) -> Tensor:
    """Turn interleaved channel pairs of float32 x [1, T, dim] by tables [T, D / 2], or one a video."""
    cos, sin = (table if table.ndim == 3 else table.unsqueeze(0) for table in rope)
    if fused:
        return ops.rotary_embedding(x, cos, sin, interleaved=True, num_heads=heads)
    # Pairs (a, b) become (-b, a) by a small matrix product: far quicker than taking channels apart.
    size = x.shape[-1] // heads
    swap = torch.kron(torch.eye(size // 2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    cos, sin = (table.repeat_interleave(2, dim=-1).unsqueeze(2) for table in (cos, sin))
    y = split_heads(x, heads)
    return (y * cos + (y @ swap) * sin).view(x.shape)


class SelfAttentionPart(nn.Module):
    """Attention of a pass's tokens over the past and themselves."""

    def __init__(
        self, source: Attention, dtype: torch.dtype, how: Lowering, choices: Choices
    ) -> None:
        super().__init__()
        self.heads, self.dtype, self.how = source.heads, dtype, how
        qkv = (source.q, source.k, source.v)
        self.qkv = Linear(*qkv, dtype=dtype, choice=choices["self_attn.qkv"])
        self.o = Linear(source.o, dtype=dtype, choice=choices["self_attn.o"])
        self.norm_q = RmsNorm(source.norm_q.weight, source.norm_q.eps)
        self.norm_k = RmsNorm(source.norm_k.weight, source.norm_k.eps)

    def forward(
        self,
        y: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Sequence[Tensor],
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y [1, T, dim] -> (attended, own keys, own values), all [1, T, dim]."""
        q, k, v = self.qkv(y).split(y.shape[-1], dim=-1)
        q, k = (
            turn(norm(x), rope, self.heads, self.how.fused).to(self.dtype)
            for norm, x in ((self.norm_q, q), (self.norm_k, k))
        )
        v = v.to(self.dtype)
        held = [torch.cat([before, own], dim=1) for before, own in zip(past, (k, v), strict=True)]
        return attend(q, held[0], held[1], self.heads, self.how, mask), k, v


class CrossAttentionPart(nn.Module):
    """Attention of a pass's tokens over the prompt."""

    def __init__(
        self, source: Attention, dtype: torch.dtype, how: Lowering, choices: Choices
    ) -> None:
        super().__init__()
        self.heads, self.dtype, self.how = source.heads, dtype, how
        self.q, self.o = (
            Linear(layer, dtype=dtype, choice=choices[f"cross_attn.{name}"])
            for name, layer in (("q", source.q), ("o", source.o))
        )
        self.norm_q = RmsNorm(source.norm_q.weight, source.norm_q.eps)

    def forward(self, y: Tensor, prompt: Sequence[Tensor]) -> Tensor:
        """y [1, T, dim] over prompt keys and values [1, L, dim] -> [1, T, dim]."""
        q = self.norm_q(self.q(y)).to(self.dtype)
        return attend(q, prompt[0], prompt[1], self.heads, self.how)


class PromptKeyValue(nn.Module):
    """Cross-attention keys (normalised) and values of one layer."""

    def __init__(self, source: Attention, dtype: torch.dtype, choice: Choice) -> None:
        super().__init__()
        self.dtype = dtype
        self.k, self.v = (
            Linear(layer, dtype=dtype, choice=choice) for layer in (source.k, source.v)
        )
        self.norm_k = RmsNorm(source.norm_k.weight, source.norm_k.eps)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """[1, L, dim] -> both [1, L, dim] in `dtype`."""
        return self.norm_k(self.k(y)).to(self.dtype), self.v(y)
