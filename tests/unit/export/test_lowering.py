"""Which runtime an engine's passes are lowered for, and what lowering costs once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from asd_rt.planner import runtime_of
from benchmarks.sizes import SIZES
from export.lowering import LOWERINGS
from export.onnx import export_part, serialize
from export.parts import engine_parts
from train.checkpoint import load_checkpoint


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


def test_torch_reads_its_operators_once_and_exports_leave_them_as_they_were(student: Path) -> None:
    checkpoint = load_checkpoint(student)
    lowering = LOWERINGS["onnxruntime"]
    parts = engine_parts(checkpoint, checkpoint.build_model(), "fp32", (4, 2), lowering)
    graphs = [serialize(export_part("text", parts["text"], lowering.opset)) for _ in range(2)]
    assert graphs[0] == graphs[1]
    read = ONNXRegistry.from_torchlib
    kept = read(opset_version=lowering.opset)
    assert read(opset_version=lowering.opset) is kept
    fresh = read.__wrapped__(opset_version=lowering.opset)
    assert fresh is not kept
    assert [(name, len(found)) for name, found in fresh.functions.items()] == [
        (name, len(found)) for name, found in kept.functions.items()
    ]
