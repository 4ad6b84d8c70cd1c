"""Weights of a large network in OpenVINO: packed straight from the bfloat16 of their file.

Left to itself, OpenVINO widens bfloat16 weights to float32, turns them around, and rounds them again when it
packs them: four times the bytes that a pass needs, held as long as the model is open.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any


def keep_weights_half(openvino: ModuleType, model: Any) -> int:
    """Let products with weights stored in bfloat16 be products in bfloat16; returns how many.

    A product that is to be computed in bfloat16 is the same afterwards. Where the processor cannot, OpenVINO
    widens it again.
    """
    operators, bf16 = openvino.opset13, openvino.Type.bf16
    count = 0
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        widened = product.input_value(1).get_node()
        if widened.get_type_name() != "Convert":
            continue
        weights = widened.input_value(0)
        constant = weights.get_node().get_type_name() == "Constant"
        if not constant or weights.get_element_type() != bf16:
            continue
        turned = product.get_attributes()
        half = operators.matmul(
            operators.convert(product.input_value(0), "bf16"),
            weights,
            turned["transpose_a"],
            turned["transpose_b"],
        )
        half.set_friendly_name(product.get_friendly_name())
        product.output(0).replace(operators.convert(half, "f32").output(0))
        count += 1
    return count
