"""How graphs are written for what runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Lowering:
    """How graphs are written for what runs them.

    Attributes:
        opset: of ONNX.
        joined: with a joined pass.
        fused: one operator each for rotary positions and modulated norms, instead of plain ones.
        cpu_only: what runs it has no card.
        attention: as ONNX Runtime's operator, as torch exports its own, or as products and a softmax.
    """

    opset: int
    joined: bool
    fused: bool
    cpu_only: bool
    attention: Literal["operator", "torch", "products"]


# OpenVINO leaves fused operators to others, and finds attention again in plain products. TensorRT fuses
# attention from opset 23.
LOWERINGS = {
    "onnxruntime": Lowering(23, joined=True, fused=True, cpu_only=False, attention="operator"),
    "openvino": Lowering(18, joined=True, fused=False, cpu_only=True, attention="products"),
    "tensorrt": Lowering(23, joined=False, fused=False, cpu_only=False, attention="torch"),
}
