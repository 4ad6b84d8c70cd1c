"""float16 graphs as a card computes them, on ONNX Runtime's CPU.

It has no float16 kernels for most operators: it computes them in float32 and drops the rounding between one
and the next, and with it every overflow. So an engine that shows black on a card would look well here. Before
an engine is measured, its float16 operators are written out: float32 inside, every result rounded to float16
by a Cast of its own, which is kept. What a fused attention holds inside stays float32, as it does on cards.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import TensorProto, helper, shape_inference

from asd_rt.manifest import Manifest

PARTS = ("denoiser", "joined", "prompt")
# They move values and round none.
MOVES = ("Cast", "Concat", "Split", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Gather",
         "Expand", "Identity", "Constant")  # fmt: skip


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX element type of every tensor of a graph, as far as it is known."""
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def round_results(model: onnx.ModelProto) -> None:
    """Let every operator on float16 compute in float32 and round its results; names stay what they are."""
    types, graph = element_types(model), model.graph
    widened: set[str] = set()
    nodes: list[onnx.NodeProto] = []

    def is_half(name: str) -> bool:
        return types.get(name) == TensorProto.FLOAT16

    for node in graph.node:
        nodes.append(node)
        if node.op_type in MOVES:
            continue
        for place, name in enumerate(node.input):
            if not is_half(name):
                continue
            wide = f"{name}.widened"
            if wide not in widened:
                cast = helper.make_node("Cast", [name], [wide], wide, to=TensorProto.FLOAT)
                nodes.insert(len(nodes) - 1, cast)
                widened.add(wide)
            node.input[place] = wide
        for place, name in enumerate(node.output):
            if is_half(name):
                wide = f"{name}.exact"
                nodes.append(helper.make_node("Cast", [wide], [name], wide, to=TensorProto.FLOAT16))
                node.output[place] = wide
    del graph.node[:]
    graph.node.extend(nodes)


def is_half(manifest: Manifest) -> bool:
    """Whether an ONNX engine computes in float16."""
    spec = manifest.parts["denoiser"].outputs.get("new_k.0")
    return spec is not None and spec.dtype == "float16"


@contextmanager
def staged(path: Path, manifest: Manifest, graphs: Mapping[str, onnx.ModelProto]) -> Iterator[Path]:
    """The engine at `path` with other graphs, in a folder of its own; its other files are links.

    Args:
        path: the denoiser's file.
        manifest: of the engine.
        graphs: by part; their weights are those beside the engine.

    Yields:
        the denoiser's file there.
    """
    # Beside the engine a link takes no room.
    beside = path.parent if os.access(path.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".parity-", dir=beside) as name:
        folder = Path(name)
        for part, entry in manifest.parts.items():
            source, target = path.parent / entry.file, folder / entry.file
            if part in graphs:
                onnx.save(graphs[part], target)
            elif source.exists():
                _link(source, target)
        yield folder / path.name


def _link(source: Path, target: Path) -> None:
    """The same file under another name, copied where the file system cannot do better."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def as_on_a_card(path: Path, manifest: Manifest) -> Iterator[Path]:
    """An ONNX engine to be measured: the very files, or those of a float16 engine with its rounding."""
    if not is_half(manifest):
        yield path
        return
    graphs = {}
    for part in PARTS:
        if part in manifest.parts:
            graphs[part] = onnx.load(
                path.parent / manifest.parts[part].file, load_external_data=False
            )
            round_results(graphs[part])
    with staged(path, manifest, graphs) as file:
        yield file
