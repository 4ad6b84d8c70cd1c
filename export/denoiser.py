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

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import ops

from export.attention import Choices, CrossAttentionPart, Linear, SelfAttentionPart
from export.lowering import Lowering
from export.quantize import Scheme
from train.model import Block, WanModel


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
