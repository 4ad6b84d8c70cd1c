"""16-bit graphs as a card computes them, on ONNX Runtime's CPU: float32, rounded wherever they round.

It has no float16 kernels for most operators: it computes them in float32 and drops the rounding between one
and the next, and with it every overflow, so an engine that shows black on a card would look well. Of bfloat16
it has next to nothing. So before an engine is measured its 16-bit values are written out as float32 ones,
each rounded by a Cast to 16 bits and back that is kept. A card, too, adds up products in float32 and rounds
once; what a fused attention holds inside stays float32 there as here. In which order a card adds is not
modelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import TensorProto, helper, shape_inference

from asd_rt.errors import EngineError
from asd_rt.manifest import Manifest, Part
from export.staged import staged

PARTS = ("denoiser", "joined", "prompt")  # others are float32 in every engine
TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# They move values and round none; a Cast does, where it makes 16 bits.
MOVES = ("Concat", "Split", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Gather", "Expand",
         "Identity")  # fmt: skip


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX element type of every tensor of a graph, as far as it is known."""
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def round_results(model: onnx.ModelProto, narrow: int) -> None:
    """Compute all values of the type `narrow` in float32 and round every result; names stay what they are.

    Inputs and outputs of the graph stay float16; bfloat16 ones, which numpy has not, become float32.

    Raises:
        EngineError: the type of a value cannot be told.
    """
    types, graph = element_types(model), model.graph
    keeps_border = narrow == TensorProto.FLOAT16
    shown = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    # A value in float32 goes by a new name where the border keeps its type, else the narrow one does.
    wide, slim = (".wide", "") if keeps_border else ("", ".narrow")

    def cast(source: str, target: str, to: int) -> None:
        nodes.append(helper.make_node("Cast", [source], [target], f"cast_{target}", to=to))

    def is_narrow(name: str) -> bool:
        return types.get(name) == narrow

    for tensor in graph.initializer:
        if tensor.data_type == narrow:
            name, tensor.name = tensor.name, f"{tensor.name}{slim}"
            cast(tensor.name, f"{name}{wide}", TensorProto.FLOAT)
    renamed = {}
    for value in graph.input:
        if not is_narrow(value.name):
            continue
        if not keeps_border:  # what comes in may hold more digits
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            cast(value.name, f"{value.name}.narrow", narrow)
            cast(f"{value.name}.narrow", f"{value.name}.rounded", TensorProto.FLOAT)
            renamed[value.name] = f"{value.name}.rounded"
        else:
            cast(value.name, f"{value.name}{wide}", TensorProto.FLOAT)
    for node in graph.node:
        unknown = [name for name in node.output if name and name not in types]
        if unknown:
            raise EngineError(
                f"{graph.name}: the type of {unknown[0]} cannot be told ({node.op_type} node {node.name})"
            )
        for place, name in enumerate(node.input):
            if is_narrow(name):
                node.input[place] = renamed.get(name, f"{name}{wide}")
        made = [name for name in node.output if is_narrow(name)]
        nodes.append(node)
        makes_narrow = node.op_type in ("Cast", "Constant")
        for place, name in enumerate(node.output):
            if name not in made:
                continue
            if makes_narrow:
                node.output[place] = f"{name}{slim}"
            elif node.op_type in MOVES and name not in shown:
                node.output[place] = f"{name}{wide}"
                continue
            else:
                node.output[place] = f"{name}.exact"
                cast(f"{name}.exact", f"{name}{slim}", narrow)
            cast(f"{name}{slim}", f"{name}{wide}", TensorProto.FLOAT)
    if not keeps_border:
        for value in graph.output:
            if is_narrow(value.name):
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)


def narrow_type(manifest: Manifest) -> str | None:
    """The 16-bit type that an ONNX engine's graphs compute in, "float16" or "bfloat16"; None = in none."""
    spec = manifest.parts["denoiser"].outputs.get("new_k.0")
    return spec.dtype if spec is not None and spec.dtype in TYPES else None


@contextmanager
def as_on_a_card(path: Path, manifest: Manifest) -> Iterator[tuple[Path, Manifest]]:
    """An ONNX engine to be measured: the very files, or those of a 16-bit engine with its rounding."""
    kind = narrow_type(manifest)
    if kind is None:
        yield path, manifest
        return
    graphs = {}
    for part in PARTS:
        if part in manifest.parts:
            file = path.parent / manifest.parts[part].file
            graphs[part] = onnx.load(file, load_external_data=False)
            round_results(graphs[part], TYPES[kind])
    shown = with_border(manifest)
    with staged(path, shown, graphs) as file:
        yield file, shown


def with_border(manifest: Manifest) -> Manifest:
    """`manifest` with the tensors at the border of its parts as `round_results` leaves them."""
    parts = {name: _widened(part) for name, part in manifest.parts.items()}
    return replace(manifest, parts=parts)


def _widened(part: Part) -> Part:
    inputs, outputs = (
        {
            name: replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec
            for name, spec in tensors.items()
        }
        for tensors in (part.inputs, part.outputs)
    )
    return replace(part, inputs=inputs, outputs=outputs)
