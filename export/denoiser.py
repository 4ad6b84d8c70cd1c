"""The network as flat tensors-in / tensors-out modules (docs/engine.md), in the precision of one engine.

`train.model` stays the definition; these modules are its lowering: weights laid out for plain matrix
products, no float64, and explicit casts, so that the exported graph is strongly typed. In fp16, matrix
products and attention are float16; norms, rotary positions, modulation, gates and the residual stream are
float32. `export.parity` measures every part against `train.model`.

Small networks spend their time between operators, so the graph is kept short: one video at a time (several
only to measure what that would bring, benchmarks/batching.py), tokens in the cache's order throughout,
queries, keys and values from one matrix product, modulations ready made, and (`fused`) one operator each for
attention, rotary positions and modulated norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import pi
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import ops

from export.lowering import Lowering
from export.quantize import PLAIN, Choice, Quantized, QuantizedInput, Scheme
from train.model import Attention, Block, WanModel

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
        if choice.divisor is not None:
            weight = weight * choice.divisor[:, None]
        self.weight = (
            Quantized(weight, dtype, choice.form) if choice.int8 else nn.Parameter(weight.to(dtype))
        )
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


class Residual:
    """The residual stream, float32 [1, T, dim]: norms of it are taken, and what branches give is added.

    Rows of scales, shifts and gates are [dim], or [1, F, 1, dim] in a joined pass, whose tokens are then
    seen as [1, F, S, dim].
    """

    def __init__(self, x: Tensor, eps: float, fused: bool) -> None:
        self.x, self.eps, self.fused = x, eps, fused

    def norm(self, shift: Tensor, scale: Tensor) -> Tensor:
        """LayerNorm of the stream, times `scale`, plus `shift`."""
        x = self.x
        if self.fused and scale.ndim == 1:  # one operator
            attributes: dict[str, Any] = {"axis": -1, "epsilon": self.eps}
            return ops.symbolic("LayerNormalization", (x, scale, shift), attributes, dtype=x.dtype,
                                shape=x.shape, version=17)  # fmt: skip
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return self._by_row(torch.add, self._by_row(torch.mul, y, scale), shift)

    def add(self, branch: Tensor, gate: Tensor | None = None) -> None:
        """Add what a branch gives, times `gate` where there is one."""
        y = branch.float()
        self.x = self.x + (y if gate is None else self._by_row(torch.mul, y, gate))

    @staticmethod
    def _by_row(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, row: Tensor) -> Tensor:
        if row.ndim == 1:
            return function(x, row)
        return function(x.view(1, row.shape[1], -1, x.shape[-1]), row).view(x.shape)


def divided(norm: nn.LayerNorm, divisor: Tensor | None) -> nn.LayerNorm:
    """`norm` with what it gives divided by `divisor` [dim]."""
    if divisor is None:
        return norm
    made = nn.LayerNorm(norm.normalized_shape, norm.eps)
    made.weight = nn.Parameter(norm.weight.detach() / divisor)
    made.bias = nn.Parameter(norm.bias.detach() / divisor)
    return made


def modulation_factors(scheme: Scheme, layers: int) -> Tensor | None:
    """float32 [6 * layers + 2, dim] to multiply modulations by, so that inputs of smoothed layers come
    divided; None = nothing to do.
    """
    rows = {6 * i + row: scheme.divisors.get(f"blocks.{i}.{name}")
            for i in range(layers)
            for name, first in (("self_attn.qkv", 0), ("ffn.up", 3))
            for row in (first, first + 1)}  # fmt: skip
    found = {row: divisor for row, divisor in rows.items() if divisor is not None}
    if not found:
        return None
    dim = len(next(iter(found.values())))
    factors = torch.ones(6 * layers + 2, dim)
    for row, divisor in found.items():
        factors[row] /= divisor
    return factors


class BlockPart(nn.Module):
    """One transformer block."""

    def __init__(self, source: Block, dtype: torch.dtype, how: Lowering, choices: Choices) -> None:
        super().__init__()
        self.self_attn = SelfAttentionPart(source.self_attn, dtype, how, choices)
        self.cross_attn = CrossAttentionPart(source.cross_attn, dtype, how, choices)
        self.norm3 = divided(source.norm3, choices["cross_attn.q"].divisor)
        self.up, self.down = (
            Linear(source.ffn[i], dtype=dtype, choice=choices[name])
            for i, name in ((0, "ffn.up"), (2, "ffn.down"))
        )

    def forward(
        self,
        stream: Residual,
        modulation: Sequence[Tensor],
        rope: tuple[Tensor, Tensor],
        prompt: Sequence[Tensor],
        past: Sequence[Tensor],
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns this pass's keys and values, [1, T, dim] in the KV dtype; `stream` goes on."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        out, k, v = self.self_attn(stream.norm(shift, scale), rope, past, mask)
        stream.add(self.self_attn.o(out), gate)
        out = self.cross_attn(stream.norm(self.norm3.bias, self.norm3.weight), prompt)
        stream.add(self.cross_attn.o(out))
        y = F.gelu(self.up(stream.norm(ffn_shift, ffn_scale)), approximate="tanh")
        stream.add(self.down(y), ffn_gate)
        return k, v


class DenoiserPart(nn.Module):
    """One causal pass, as in docs/engine.md; prompt and past come layer by layer, k before v."""

    factors: Tensor | None

    def __init__(
        self, model: WanModel, dtype: torch.dtype, how: Lowering, scheme: Scheme | None = None
    ) -> None:
        """The part of `model` in `dtype`; `scheme`: which products are computed in another way."""
        super().__init__()
        scheme = scheme or Scheme()
        self.layers, self.eps, self.fused = model.config.num_layers, model.config.eps, how.fused
        patch = model.patch_embedding
        linear = nn.Linear(patch.in_channels * 4, patch.out_channels, device="meta")
        values = {"weight": patch.weight.flatten(1), "bias": cast(Tensor, patch.bias)}
        linear.load_state_dict(values, assign=True)
        # Small, and where the latents come in unharmed.
        self.patch = Linear(linear, dtype=torch.float32)
        self.blocks = nn.ModuleList(
            BlockPart(cast(Block, block), dtype, how, scheme.of_block(i))
            for i, block in enumerate(model.blocks)
        )
        self.register_buffer("factors", modulation_factors(scheme, self.layers))
        self.head = Linear(model.head.head, dtype=torch.float32)

    def forward(
        self,
        latents: Tensor,
        modulation: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        *layers: Tensor,
    ) -> tuple[Tensor, ...]:
        return self.run(latents, modulation, (rope_cos, rope_sin), None, layers)

    def run(
        self,
        latents: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        layers: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """(flow, this pass's keys and values layer by layer); `mask` bool [T, P + T], None = all seen."""
        prompt, past = layers[: 2 * self.layers], layers[2 * self.layers :]
        videos, frames, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        x = latents.reshape(videos * frames, channels, rows, 2, columns, 2).permute(
            0, 2, 4, 1, 3, 5
        )
        x = self.patch(x.reshape(videos, frames * rows * columns, channels * 4))
        by_frame = modulation.ndim > 2
        dim = modulation.shape[-1]
        if self.factors is not None:
            modulation = modulation * (self.factors[:, None, None] if by_frame else self.factors)
        m = torch.split(modulation, 1) if by_frame else torch.split(modulation.flatten(), dim)
        stream = Residual(x, self.eps, self.fused)
        new: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            pair = slice(2 * i, 2 * i + 2)
            new += block(stream, m[6 * i : 6 * i + 6], rope, prompt[pair], past[pair], mask)
        x = self.head(stream.norm(*m[-2:]))
        x = x.view(videos * frames, rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(videos, frames, -1, height, width), *new


class JoinedPart(DenoiserPart):
    """Two blocks in one pass: the mask says what each token sees, of the past and of this pass."""

    def __init__(self, denoiser: DenoiserPart) -> None:
        """The part on the very weights of `denoiser`."""
        nn.Module.__init__(self)
        self.layers, self.eps, self.fused = denoiser.layers, denoiser.eps, denoiser.fused
        self.patch, self.blocks, self.head = denoiser.patch, denoiser.blocks, denoiser.head
        self.register_buffer("factors", denoiser.factors)

    def forward(
        self,
        latents: Tensor,
        modulation: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        mask, *layers = others
        return self.run(latents, modulation, (rope_cos, rope_sin), mask, layers)


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
