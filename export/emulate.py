"""bfloat16 graphs for ONNX Runtime, whose CPU kernels have no bfloat16: float32, rounded wherever they round.

Products of bfloat16 factors are summed in float32 on a card too, and rounded once, when they are written. So
this computes what a card does, but for the order of sums and for values that a fused kernel never writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from asd_rt.errors import EngineError
from asd_rt.manifest import Manifest, Part, TensorSpec

PREFIX = "emulated."


def emulated_engine(folder: Path, manifest: Manifest) -> Manifest:
    """Write the graphs of an engine in `folder` once more, without bfloat16 computation.

    Returns:
        a manifest of these, for measuring; their files begin with `PREFIX`, their weights are the engine's.

    Raises:
        EngineError: the types within a graph cannot be told.
    """
    parts = {}
    for name, part in manifest.parts.items():
        if not part.inputs:  # weights
            parts[name] = part
            continue
        model = onnx.load(folder / part.file, load_external_data=False)
        try:
            widen(model)
        except onnx.shape_inference.InferenceError as error:
            raise EngineError(f"{name}: types of its graph cannot be told: {error}") from error
        file = PREFIX + part.file
        (folder / file).write_bytes(model.SerializeToString(deterministic=True))
        parts[name] = Part(
            file, part.sha256, part.bytes, _widened(part.inputs), _widened(part.outputs)
        )
    return replace(manifest, parts=parts)


def _widened(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    return {
        name: replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec
        for name, spec in tensors.items()
    }


def widen(model: onnx.ModelProto) -> None:
    """Make every bfloat16 value of `model` a float32 one that was rounded to bfloat16."""
    narrow = _narrow_values(model)
    graph, nodes = model.graph, []

    def round_to(name: str, wide: str) -> list[onnx.NodeProto]:
        """Nodes that make `name`, which is `wide` rounded."""
        return [
            helper.make_node("Cast", [wide], [f"{name}.bf16"], to=TensorProto.BFLOAT16),
            helper.make_node("Cast", [f"{name}.bf16"], [name], to=TensorProto.FLOAT),
        ]

    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            name, tensor.name = tensor.name, f"{tensor.name}.bf16"
            nodes.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    read = {}
    for value in graph.input:
        if value.name in narrow:
            read[value.name] = f"{value.name}.rounded"
            nodes += round_to(read[value.name], value.name)
    for node in graph.node:
        made = [name for name in node.output if name in narrow]
        for i, name in enumerate(node.input):
            node.input[i] = read.get(name, name)
        for i, name in enumerate(node.output):
            if name in narrow:
                node.output[i] = f"{name}.wide"
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and made:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for name in made:
            nodes += round_to(name, f"{name}.wide")
    for value in (*graph.input, *graph.output):
        if value.name in narrow:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)


def _narrow_values(model: onnx.ModelProto) -> set[str]:
    """Names of the bfloat16 values in a graph, but for its weights."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.BFLOAT16}
