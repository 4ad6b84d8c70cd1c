"""int8 products with explicit quantisation in the graph: weights by output channel, inputs as a whole.

Both are symmetric: q = round(x / scale) in -127..127. Weights are stored as int8 and a scale a channel, a
quarter of float32. Which layers, and the scales of their inputs, come from `export.calibrate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import ops

LEVELS = 127
# What a block multiplies by weights: name in an engine -> linear layers of `train.model.Block`, side by side.
LAYERS = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "self_attn.o": ("self_attn.o",),
    "cross_attn.q": ("cross_attn.q",),
    "cross_attn.o": ("cross_attn.o",),
    "ffn.up": ("ffn.0",),
    "ffn.down": ("ffn.2",),
}
Scales = Mapping[str, float]  # input scale of each int8 layer of a block


@dataclass(frozen=True)
class Scheme:
    """Which products of a network are int8.

    Attributes:
        input_scales: scale of the input of each int8 layer, "blocks.3.ffn.up".
        kept: layers that stay in the engine's floating-point type, worst first.
    """

    input_scales: Mapping[str, float]
    kept: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"int8_layers": len(self.input_scales), "kept": list(self.kept), **self.figures}

    def of_block(self, index: int) -> dict[str, float]:
        """Scales of block `index`, by the names in LAYERS."""
        prefix = f"blocks.{index}."
        return {
            name.removeprefix(prefix): scale
            for name, scale in self.input_scales.items()
            if name.startswith(prefix)
        }


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[in, out] -> (int8 [in, out], scales float32 [out]); a channel of zeros has scale 1."""
    scale = weight.detach().float().abs().amax(dim=0) / LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(weight.detach().float() / scale).to(torch.int8), scale


def fake_quantize(x: Tensor, scale: float) -> Tensor:
    """x as it is after int8: rounded to multiples of `scale`, clipped to 127 of them."""
    return torch.clamp(torch.round(x / scale), -LEVELS, LEVELS) * scale


class Quantized(nn.Module):
    """A weight [in, out] stored as int8."""

    values: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        values, scale = quantize_weight(weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int8))

    def forward(self) -> Tensor:
        """The weight, in floating point."""
        return ops.symbolic(
            "DequantizeLinear", (self.values, self.scale, self.zero), {"axis": 1},
            dtype=self.scale.dtype, shape=self.values.shape,
        )  # fmt: skip


class QuantizedInput(nn.Module):
    """An input as it is after int8."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        """x through int8 and back."""
        q = ops.symbolic(
            "QuantizeLinear", (x, self.scale, self.zero), dtype=torch.int8, shape=x.shape
        )
        return ops.symbolic(
            "DequantizeLinear", (q, self.scale, self.zero), dtype=self.scale.dtype, shape=x.shape
        )
