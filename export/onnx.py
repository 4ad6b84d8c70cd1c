"""Parts to ONNX: one deterministic graph each, with the tensor names and shape symbols of docs/engine.md."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from asd_rt.decoding import STATE
from asd_rt.errors import EngineError
from asd_rt.manifest import TensorSpec
from export.parts import PartModule, TensorShape

MAX_BYTES = 2**31 - 2**20  # a protobuf file ends at 2 GB
HALF_MIN_ELEMENTS = 1024

_EXAMPLE_SIZES = {"B": 2, "F": 3, "P": 7, "h": 6, "w": 4, "rows": 24, "columns": 16, "L": 5}
_ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
    torch.int8: TensorProto.INT8,
}


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def tensor_specs(tensors: Mapping[str, TensorShape]) -> dict[str, TensorSpec]:
    """Tensors of a part as a manifest describes them."""
    return {name: TensorSpec(dtype_name(dtype), shape) for name, (dtype, shape) in tensors.items()}


def _example_inputs(part: PartModule) -> tuple[torch.Tensor, ...]:
    """Zeros of every input; sizes are distinct and above 1, so that no symbol is taken for a constant."""
    sizes = dict(_EXAMPLE_SIZES)
    if "latents" in part.inputs:
        height, width = (_size(n, sizes) for n in part.inputs["latents"][1][3:])
        sizes["T"] = sizes["F"] * (height // 2) * (width // 2)
        sizes["S"] = sizes["P"] + sizes["T"]
    named = len(part.inputs) - part.stored
    return tuple(
        # One zero seen as a whole weight takes no memory.
        torch.zeros((), dtype=dtype).expand([_size(n, sizes) for n in shape])
        if i >= named
        else torch.zeros([_size(n, sizes) for n in shape], dtype=dtype)
        for i, (dtype, shape) in enumerate(part.inputs.values())
    )


def _size(entry: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(entry, int):
        return entry
    symbol = entry.lstrip("0123456789")  # "8h" is 8 times the size of h
    return int(entry.removesuffix(symbol) or 1) * sizes[symbol]


def export_part(name: str, part: PartModule, opset: int, half: bool = False) -> onnx.ModelProto:
    """One part as an ONNX model; the same weights give the same bytes.

    Args:
        name: of the part, which becomes the graph's name.
        part: see `export.parts.engine_parts`.
        opset: of ONNX.
        half: store all large weights in float16, rounded; they are computed with in float32.

    Raises:
        EngineError: the exporter cannot lower the part, or the result is too large for one file.
    """
    dynamic = torch.export.Dim.DYNAMIC
    shapes = [
        {axis: dynamic for axis, size in enumerate(shape) if isinstance(size, str)}
        for _, shape in part.inputs.values()
    ]
    # A pass takes its layers' tensors as *args, which torch.export sees as one tuple.
    if name in ("denoiser", "joined"):
        fixed = 4
    elif f"{STATE}0" in part.inputs:
        fixed = 1
    else:
        fixed = len(shapes) - part.stored
    dynamic_shapes = (
        (*shapes[:fixed], tuple(shapes[fixed:])) if fixed < len(shapes) else tuple(shapes)
    )
    with _quiet_exporter():
        try:
            program = torch.onnx.export(
                part.module,
                _example_inputs(part),
                dynamo=True,
                opset_version=opset,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                dynamic_shapes=dynamic_shapes,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise EngineError(f"{name}: torch.onnx cannot export this part: {reason}") from error
    if program is None:
        raise EngineError(f"{name}: torch.onnx.export returned nothing")
    return _clean(program.model_proto, name, part, half)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes about packages that it looks for out of the build's progress."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            yield
        finally:
            logger.setLevel(level)


def _clean(model: onnx.ModelProto, name: str, part: PartModule, half: bool) -> onnx.ModelProto:
    """Contract names in, stack traces and file names out, weights that allow it in half the bytes."""
    graph = model.graph
    graph.name = name
    model.doc_string, model.producer_name, model.producer_version = "", "asd-rt", ""
    _widen_norm_inputs(graph)
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    graph.doc_string = ""
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for values, specs in ((graph.input, part.inputs), (graph.output, part.outputs)):
        found = [value.name for value in values]
        if found != list(specs):
            raise EngineError(
                f"{name}: expected tensors {', '.join(specs)}, the exporter left {', '.join(found)}"
            )
        described = [_value_info(key, spec) for key, spec in specs.items()]
        del values[:]
        values.extend(described)
    read = {key for node in graph.node for key in node.input}
    unused = [key for key in part.inputs if key not in read]
    if unused:
        raise EngineError(
            f"{name}: no node reads the inputs {', '.join(unused)}; the part was lowered wrongly"
        )
    _halve_weights(graph, half)
    size = model.ByteSize()
    if size > MAX_BYTES:
        raise EngineError(
            f"{name}: {size / 1e9:.1f} GB of weights, but one ONNX file holds at most 2 GB; "
            "build this checkpoint with --precision fp16"
        )
    onnx.checker.check_model(model)
    return model


def _value_info(name: str, spec: TensorShape) -> onnx.ValueInfoProto:
    dtype, shape = spec
    return helper.make_tensor_value_info(name, _ELEMENT_TYPES[dtype], shape)


def _widen_norm_inputs(graph: onnx.GraphProto) -> None:
    """Give float32 RMSNorms of float16 values their Cast back.

    The exporter folds the Cast into the node, which then mixes two types; TensorRT takes only one.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    nodes = []
    for node in graph.node:
        if node.op_type == "RMSNormalization" and types.get(node.input[0]) == TensorProto.FLOAT16:
            wide = f"{node.input[0]}.fp32"
            cast = f"{node.name}_cast"
            nodes.append(
                helper.make_node("Cast", [node.input[0]], [wide], cast, to=TensorProto.FLOAT)
            )
            node.input[0] = wide
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _halve_weights(graph: onnx.GraphProto, rounded: bool) -> None:
    """Store float32 weights that float16 holds exactly as float16 and a Cast; runtimes fold it on loading.

    With `rounded`, also those that it does not hold exactly, unless they overflow.
    """
    casts = []
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < HALF_MIN_ELEMENTS or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        half = values.astype(np.float16)
        if not rounded and not np.array_equal(half.astype(np.float32), values):
            continue
        original = tensor.name
        stored = f"{original}.fp16"
        tensor.CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(
            helper.make_node("Cast", [stored], [original], f"cast_{original}", to=TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def serialize(model: onnx.ModelProto) -> bytes:
    """The bytes of an ONNX file, in protobuf's deterministic order."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content
