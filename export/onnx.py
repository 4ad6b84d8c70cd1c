"""Parts to ONNX: one deterministic graph each, with the tensor names and shape symbols of docs/engine.md."""

from __future__ import annotations

import ast
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from asd_rt.decoding import STATE
from asd_rt.errors import EngineError
from asd_rt.manifest import TensorSpec
from export.parts import PartModule, TensorShape
from export.weights import MIN_BYTES, WeightsFile

HALF_MIN_ELEMENTS = 1024

_EXAMPLE_SIZES = {"B": 2, "F": 3, "P": 7, "h": 6, "w": 4, "rows": 24, "columns": 16, "L": 5}
_ELEMENT_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
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


def export_part(
    name: str,
    part: PartModule,
    opset: int,
    weights: WeightsFile | None = None,
    rounded: str = "",
    origins: bool = False,
) -> onnx.ModelProto:
    """One part as an ONNX model; the same weights give the same bytes.

    Args:
        name: of the part, which becomes the graph's name.
        part: see `export.parts.engine_parts`.
        opset: of ONNX.
        weights: where weights go; the graph refers to them. None = they stay in the graph.
        rounded: "bf16" stores float32 matrices in bfloat16, for what computes in it anyway; "fp16" all larger
            float32 weights in float16; "" only those that float16 holds exactly.
        origins: name nodes after the module that they come from ("blocks.0.self_attn.qkv/node_matmul_1"), for
            what reads names in a build log.

    Raises:
        EngineError: the exporter cannot lower the part.
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
        _remember_operators()
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
    halved = {} if weights is None else _move_weights(program.model.graph, weights, rounded)
    model = program.model_proto
    _part_zero_points(model.graph)
    if origins:
        _name_origins(model.graph)
    return _clean(model, name, part, halved)


def _part_zero_points(graph: onnx.GraphProto) -> None:
    """Give every quantised weight a zero point of its own; the exporter lets equal ones be one.

    Where a processor's products of signed bytes saturate, ONNX Runtime makes weights unsigned and moves
    their zero points, which it cannot do twice with one.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        zero = node.input[2]
        if zero in taken:
            own = graph.initializer.add()
            own.CopyFrom(tensors[zero])
            own.name = node.input[2] = f"{node.input[0]}.zero"
        taken.add(zero)


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


@functools.cache
def _remember_operators() -> None:
    """Have torch.onnx read its own operators once in a process instead of once a graph.

    It parses the sources of some 500 functions each time, almost half of the work of a small graph, and
    the result is the same for one opset. The name is private: where it is gone, exports are only slower.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


def _move_weights(graph: ir.Graph, weights: WeightsFile, rounded: str) -> dict[str, str]:
    """Move the larger weights of `graph` into the file, those that allow it in half the bytes.

    Returns:
        suffix of the stored type by name, of float32 weights that are stored as another.
    """
    halved = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise EngineError(f"weight {name} has no value; the part was lowered wrongly")
        stored, dtype = tensor.numpy(), tensor.dtype
        if dtype == ir.DataType.FLOAT and stored.size >= HALF_MIN_ELEMENTS:
            half = _halve(stored, rounded)
            if half is not None:
                stored, dtype, halved[name] = half
        if stored.nbytes < MIN_BYTES:
            continue
        place = weights.add(stored)
        value.const_value = ir.ExternalTensor(
            weights.path.name,
            place.offset,
            place.length,
            dtype,
            shape=ir.Shape(stored.shape),
            name=name,
        )
    return halved


def _halve(
    values: NDArray[np.float32], rounded: str
) -> tuple[NDArray[Any], ir.DataType, str] | None:
    """`values` in half the bytes, with their type and its suffix; None where that may not be."""
    if rounded == "bf16" and values.ndim == 2:
        half = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return half.view(torch.uint16).numpy(), ir.DataType.BFLOAT16, "bf16"
    if np.abs(values).max() > np.finfo(np.float16).max:
        return None
    narrow = values.astype(np.float16)
    keep = rounded == "fp16" or np.array_equal(narrow.astype(np.float32), values)
    return (narrow, ir.DataType.FLOAT16, "fp16") if keep else None


def _clean(
    model: onnx.ModelProto, name: str, part: PartModule, halved: Mapping[str, str]
) -> onnx.ModelProto:
    """Contract names in, stack traces and file names out, a Cast behind `halved` weights."""
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
    _widen_weights(graph, halved)
    return model


def _name_origins(graph: onnx.GraphProto) -> None:
    """Put the module that a node comes from before its name, where the exporter noted it."""
    for node in graph.node:
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes":
                # The whole network, modules from the outermost in, and the node itself.
                module = ast.literal_eval(entry.value)[:-1]
                if module and module[-1]:
                    node.name = f"{module[-1]}/{node.name}"


def _value_info(name: str, spec: TensorShape) -> onnx.ValueInfoProto:
    dtype, shape = spec
    return helper.make_tensor_value_info(name, _ELEMENT_TYPES[dtype], shape)


def _widen_norm_inputs(graph: onnx.GraphProto) -> None:
    """Give float32 RMSNorms of 16-bit values their Cast back.

    The exporter folds the Cast into the node, which then mixes two types; TensorRT takes only one.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    nodes = []
    for node in graph.node:
        narrow = types.get(node.input[0]) in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        if node.op_type == "RMSNormalization" and narrow:
            wide = f"{node.input[0]}.fp32"
            cast = f"{node.name}_cast"
            nodes.append(
                helper.make_node("Cast", [node.input[0]], [wide], cast, to=TensorProto.FLOAT)
            )
            node.input[0] = wide
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _widen_weights(graph: onnx.GraphProto, halved: Mapping[str, str]) -> None:
    """Give weights that are stored in half the bytes their Cast back; runtimes fold it on loading."""
    casts = []
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
        original = tensor.name
        if original not in halved:
            tensor.doc_string = ""
            continue
        tensor.ClearField("doc_string")
        tensor.name = f"{original}.{halved[original]}"
        casts.append(
            helper.make_node(
                "Cast", [tensor.name], [original], f"cast_{original}", to=TensorProto.FLOAT
            )
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def serialize(model: onnx.ModelProto) -> bytes:
    """The bytes of an ONNX file, in protobuf's deterministic order."""
    content: bytes = model.SerializeToString(deterministic=True)
    return content
