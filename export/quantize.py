"""int8 products with explicit quantisation in the graph: weights by output channel, inputs as a whole.

Both are symmetric: q = round(x / scale) in -127..127. Weights are stored as int8 and a scale a channel, a
quarter of float32. Which layers, and the scales of their inputs, come from `export.calibrate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of 8 bits, and the largest number that it is used for."""

    name: str
    largest: int
    dtype: torch.dtype

    def round(self, x: Tensor) -> Tensor:
        """x, float32, in this type; what is larger than the largest becomes that."""
        y = x if self.dtype.is_floating_point else torch.round(x)
        return torch.clamp(y, -self.largest, self.largest).to(self.dtype)


INT8 = Kind("int8", LEVELS, torch.int8)
FP8 = Kind("fp8", 448, torch.float8_e4m3fn)  # E4M3, on cards from sm89 on
KINDS = {kind.name: kind for kind in (INT8, FP8)}


class InputScale(NamedTuple):
    """How the input of a product of 8 bits is rounded."""

    scale: float
    kind: Kind = INT8


Scales = Mapping[str, InputScale]  # of each such layer of a block


@dataclass(frozen=True)
class Scheme:
    """Which products of a network are int8.

    Attributes:
        input_scales: scale of the input of each int8 layer, "blocks.3.ffn.up".
        kept: layers that stay in the engine's floating-point type, worst first.
        kind: of 8 bits; "int8" above may be another.
    """

    input_scales: Mapping[str, float]
    kept: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind = INT8

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        layers = f"{self.kind.name}_layers"
        return {layers: len(self.input_scales), "kept": list(self.kept), **self.figures}

    def of_block(self, index: int) -> dict[str, InputScale]:
        """Scales of block `index`, by the names in LAYERS."""
        prefix = f"blocks.{index}."
        return {
            name.removeprefix(prefix): InputScale(scale, self.kind)
            for name, scale in self.input_scales.items()
            if name.startswith(prefix)
        }


def quantize_weight(weight: Tensor, kind: Kind = INT8) -> tuple[Tensor, Tensor]:
    """[in, out] -> (`kind` [in, out], scales float32 [out]); a channel of zeros has scale 1."""
    scale = weight.detach().float().abs().amax(dim=0) / kind.largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return kind.round(weight.detach().float() / scale), scale


def fake_quantize(x: Tensor, scale: float, kind: Kind = INT8) -> Tensor:
    """x as it is after `kind`: multiples of `scale` that it holds, clipped to its largest."""
    return kind.round(x / scale).to(x.dtype) * scale


class Quantized(nn.Module):
    """A weight [in, out] stored in 8 bits."""

    values: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype, kind: Kind = INT8) -> None:
        super().__init__()
        values, scale = quantize_weight(weight, kind)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("zero", torch.zeros(len(scale)).to(kind.dtype))

    def forward(self) -> Tensor:
        """The weight, in floating point."""
        return ops.symbolic(
            "DequantizeLinear", (self.values, self.scale, self.zero), {"axis": 1},
            dtype=self.scale.dtype, shape=self.values.shape,
        )  # fmt: skip


class QuantizedInput(nn.Module):
    """An input as it is after 8 bits."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: float, dtype: torch.dtype, kind: Kind = INT8) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype))
        self.register_buffer("zero", torch.zeros(()).to(kind.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x through 8 bits and back."""
        q = ops.symbolic(
            "QuantizeLinear", (x, self.scale, self.zero), dtype=self.zero.dtype, shape=x.shape
        )
        return ops.symbolic(
            "DequantizeLinear", (q, self.scale, self.zero), dtype=self.scale.dtype, shape=x.shape
        )
