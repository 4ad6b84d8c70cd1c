"""Weights of a large network in OpenVINO: packed straight from the bfloat16 of their file.

Left to itself, OpenVINO widens bfloat16 weights to float32, turns them around, and rounds them again when it
packs them: four times the bytes that a pass needs, held as long as the model is open.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

_FIXED = ("Constant", "Convert")  # a bias, as it is or widened


def keep_weights_half(openvino: ModuleType, model: Any) -> int:
    """Let products with weights stored in bfloat16 be products in bfloat16; returns how many.

    A bias and an activation right behind a product go with it, for OpenVINO then rounds once, after them. All
    is to be computed in bfloat16 anyway. Where the processor cannot, OpenVINO widens it again.
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
        given = operators.convert(product.input_value(0), "bf16")
        half = operators.matmul(given, weights, turned["transpose_a"], turned["transpose_b"])
        half.set_friendly_name(product.get_friendly_name())
        end = product
        follower = _only_follower(end)
        if follower is not None and follower.get_type_name() == "Add":
            inputs = [follower.input_value(i) for i in (0, 1)]
            bias = next((x for x in inputs if x.get_node().get_type_name() in _FIXED), None)
            if bias is not None:
                half, end = operators.add(half, operators.convert(bias, "bf16")), follower
                follower = _only_follower(end)
        if follower is not None and follower.get_type_name() == "Gelu":
            mode = follower.get_attributes()["approximation_mode"]
            half, end = operators.gelu(half, mode.lower()), follower
        end.output(0).replace(operators.convert(half, "f32").output(0))
        count += 1
    return count


def _only_follower(node: Any) -> Any | None:
    """The one node that reads what `node` gives; None where there are several."""
    readers = list(node.output(0).get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 else None
