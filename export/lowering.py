"""How graphs are written for what runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asd_rt.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Lowering:
    """How graphs are written for what runs them.

    Attributes:
        opset: of ONNX.
        joined: with a joined pass.
        fused: one operator each for rotary positions and modulated norms, instead of plain ones.
        attention: as ONNX Runtime's operator, as torch exports its own, or as products and a softmax.
    """

    opset: int
    joined: bool
    fused: bool
    attention: Literal["operator", "torch", "products"]


# OpenVINO leaves fused operators to others, and finds attention again in plain products. TensorRT fuses
# attention from opset 23.
LOWERINGS = {
    "onnxruntime": Lowering(23, joined=True, fused=True, attention="operator"),
    "openvino": Lowering(18, joined=True, fused=False, attention="products"),
    "tensorrt": Lowering(23, joined=False, fused=False, attention="torch"),
}

# Of an int8 network; below, OpenVINO loses more between products than it gains in them.
SMALL_PARAMETERS = 8e6


def runtime_of(backend: str, precision: str, model: ModelConfig) -> str:
    """What runs the passes of an engine: a key of LOWERINGS."""
    if backend != "onnx":
        return "tensorrt"
    a_layer = 8 * model.dim**2 + 2 * model.dim * model.ffn_dim
    large = model.num_layers * a_layer >= SMALL_PARAMETERS
    halved = precision == "bf16" or (precision == "int8" and large)
    return "openvino" if halved else "onnxruntime"
