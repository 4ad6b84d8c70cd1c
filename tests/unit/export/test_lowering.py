"""Which runtime an engine's passes are lowered for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asd_rt.planner import runtime_of
from benchmarks.sizes import SIZES
from export.lowering import LOWERINGS


@pytest.mark.parametrize(
    ("backend", "precision", "layers", "runtime"),
    [
        ("onnx", "fp32", 12, "onnxruntime"),
        ("onnx", "fp16", 12, "onnxruntime"),
        ("onnx", "bf16", 1, "openvino"),
        ("onnx", "int8", 12, "openvino"),
        ("onnx", "int8", 2, "onnxruntime"),
        ("tensorrt_rtx", "int8", 12, "tensorrt"),
    ],
)
def test_runtime(backend: str, precision: str, layers: int, runtime: str) -> None:
    model = replace(SIZES["28m"].model, num_layers=layers)
    assert runtime_of(backend, precision, model) == runtime
    assert runtime in LOWERINGS
