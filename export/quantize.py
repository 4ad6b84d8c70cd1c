"""int8 products with explicit quantisation in the graph: weights by output channel, inputs as a whole.

Both are symmetric: q = round(x / scale) in -127..127. Weights are stored as int8 and a scale a channel, a
quarter of float32. Which layers, and the scales of their inputs, come from `export.calibrate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.onnx import ops

from asd_rt.errors import ConfigError
from export.gptq import round_compensated

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
# Layers whose input comes straight from a norm with scale and shift: both can be divided, channel by channel,
# for nothing, and the weights multiplied, so that no channel drowns the others (SmoothQuant).
SMOOTHED = ("self_attn.qkv", "cross_attn.q", "ffn.up")


@dataclass(frozen=True, slots=True)
class Format:
    """A type of 8 bits, and the largest number that it is used for."""

    name: str
    largest: int
    dtype: torch.dtype

    def round(self, x: Tensor) -> Tensor:
        """x, float32, in this type; what is larger than the largest becomes that."""
        y = x if self.dtype.is_floating_point else torch.round(x)
        return torch.clamp(y, -self.largest, self.largest).to(self.dtype)


INT8 = Format("int8", LEVELS, torch.int8)
FP8 = Format("fp8", 448, torch.float8_e4m3fn)  # E4M3, on cards from sm89 on
FORMATS = {form.name: form for form in (INT8, FP8)}


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of an engine of 8 bits by hand.

    Attributes:
        keep: layers that stay in floating point, "blocks.3.ffn.up".
        activations: "float" for int8 weights alone.
    """

    keep: tuple[str, ...] = ()
    activations: Literal["int8", "float"] = "int8"

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"keep": list(self.keep), "activations": self.activations}


NO_WISH = Wish()


def layer_names(num_layers: int) -> list[str]:
    """Names of all layers that can be int8, in the order in which they run."""
    return [f"blocks.{i}.{name}" for i in range(num_layers) for name in LAYERS]


def check_wish(wish: Wish, num_layers: int) -> None:
    """Refuse layers that the network does not have.

    Raises:
        ConfigError: with the names nearest to the first unknown one.
    """
    known = layer_names(num_layers)
    for name in wish.keep:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.0)
            raise ConfigError(
                f"--keep-layers {name}: no such layer among {len(known)}; nearest: {', '.join(near)}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How one product is computed.

    Attributes:
        int8: its weights are stored as int8.
        input_scale: of its input as int8; None = the input stays as it is.
        divisor: float32 [in], what its input comes divided by; the weights are multiplied by it.
        wide: in float32, whatever the engine's type is.
        form: of its 8 bits; "int8" stands for it.
        covariance: of its input, to round weights by; None = to the nearest.
    """

    int8: bool = False
    input_scale: float | None = None
    divisor: Tensor | None = None
    wide: bool = False
    form: Format = INT8
    covariance: Tensor | None = None

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`weight` [in, out] of a linear layer in 8 bits, as `quantize_weight`, with `divisor` in it."""
        covariance, divisor = self.covariance, self.divisor
        if divisor is not None:
            weight = weight * divisor[:, None]
            if covariance is not None:
                covariance = covariance / (divisor[:, None] * divisor)
        return quantize_weight(weight, self.form, covariance)


PLAIN = Choice()


@dataclass(frozen=True)
class Scheme:
    """How the products in the blocks of a network are computed; in the engine's type where it says nothing.

    Attributes:
        input_scales: scale of the input of each layer whose product is one of int8, "blocks.3.ffn.up".
        kept: layers that stay in the engine's floating-point type, worst first.
        figures: more for the manifest.
        weight_only: layers with int8 weights and inputs in floating point, worst first.
        divisors: float32 [in] of smoothed layers, see `Choice`.
        wide: layers in float32, worst first.
        form: of 8 bits; "int8" stands for it.
        covariances: of the inputs of layers with int8 weights, see `Choice`.
    """

    input_scales: Mapping[str, float] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    weight_only: tuple[str, ...] = ()
    divisors: Mapping[str, Tensor] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    form: Format = INT8
    covariances: Mapping[str, Tensor] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it."""
        if not (self.input_scales or self.weight_only or self.kept):
            return dict(self.figures)
        return {
            f"{self.form.name}_layers": len(self.input_scales),
            "weight_only": list(self.weight_only),
            "kept": list(self.kept),
            "smoothed": list(self.divisors),
            "compensated_layers": len(self.covariances),
            **self.figures,
        }

    def of_block(self, index: int) -> dict[str, Choice]:
        """Choices for block `index`, by the names in LAYERS."""
        return {name: self.of(f"blocks.{index}.{name}") for name in LAYERS}

    def of(self, name: str) -> Choice:
        """Choice for layer `name`."""
        scale = self.input_scales.get(name)
        int8 = scale is not None or name in self.weight_only
        return Choice(
            int8,
            scale,
            self.divisors.get(name),
            name in self.wide,
            self.form,
            self.covariances.get(name),
        )


def quantize_weight(
    weight: Tensor, form: Format = INT8, covariance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[in, out] -> (`form` [in, out], scales float32 [out]); a channel of zeros has scale 1.

    `covariance` [in, in] of the inputs: products with them are to come out best. Else weights are rounded to
    the nearest, as fp8's always are.
    """
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=0) / form.largest
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # Inputs that overflow are for the build's gate to name.
    if covariance is None or form.dtype.is_floating_point or not covariance.isfinite().all():
        return form.round(weight / scale), scale
    return round_compensated(weight, scale, covariance, form.largest).to(form.dtype), scale


def fake_quantize(x: Tensor, scale: float | Tensor, form: Format = INT8) -> Tensor:
    """x as it is after `form`: multiples of `scale` that it holds, clipped to its largest."""
    return form.round(x / scale).to(x.dtype) * scale


class Quantized(nn.Module):
    """A weight [in, out] stored in 8 bits."""

    values: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, dtype: torch.dtype, choice: Choice) -> None:
        super().__init__()
        values, scale = choice.quantized(weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("zero", torch.zeros(len(scale)).to(choice.form.dtype))

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

    def __init__(self, scale: float, dtype: torch.dtype, form: Format = INT8) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype))
        self.register_buffer("zero", torch.zeros(()).to(form.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x through 8 bits and back."""
        q = ops.symbolic(
            "QuantizeLinear", (x, self.scale, self.zero), dtype=self.zero.dtype, shape=x.shape
        )
        return ops.symbolic(
            "DequantizeLinear", (q, self.scale, self.zero), dtype=self.scale.dtype, shape=x.shape
        )
