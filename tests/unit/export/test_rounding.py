"""bfloat16 graphs in float32: they round where bfloat16 would, and nowhere else."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from export.rounding import round_results

BF16 = ml_dtypes.bfloat16


def test_rounding_is_that_of_bfloat16() -> None:
    """x cast, times w, plus b, cast back: each result is rounded once."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((5, 64)).astype(np.float32)
    past = draw.standard_normal((5, 3)).astype(np.float32)
    w, b = draw.standard_normal((64, 3)).astype(BF16), draw.standard_normal(3).astype(BF16)
    make = helper.make_node
    nodes = [
        make("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        make("MatMul", ["narrow", "w"], ["product"]),
        make("Add", ["product", "b"], ["sum"]),
        make("Add", ["sum", "past"], ["kept"]),
        make("Cast", ["kept"], ["y"], to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["T", 64]), value("past", TensorProto.BFLOAT16, ["T", 3])],
        [value("y", TensorProto.FLOAT, ["T", 3]), value("kept", TensorProto.BFLOAT16, ["T", 3])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    round_results(model, TensorProto.BFLOAT16)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    y, kept = session.run(["y", "kept"], {"x": x, "past": past})

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32).astype(BF16).astype(np.float32)

    expected = rounded(rounded(x) @ w.astype(np.float32))
    expected = rounded(expected + b.astype(np.float32))
    expected = rounded(expected + rounded(past))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(kept, expected)
    assert not np.array_equal(y, x @ w.astype(np.float32) + b.astype(np.float32) + past)
