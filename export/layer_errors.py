"""Where in the network an engine's error arises: products and blocks of its graph beside torch's layers.

The graph of the denoiser gets the tensors in question as further outputs and runs on what the engine runs
on. They are found by the names of weights, which the exporter keeps: "blocks.3.down.weight" is that of block
3's second feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from asd_rt.backends.ort import OrtEngine, open_engine
from asd_rt.errors import EngineError
from asd_rt.manifest import Manifest, TensorSpec
from export.metrics import Array, relative_l2, short
from export.passes import checkpoint_cases, run_part
from export.quantize import LAYERS
from export.rounding import TYPES, element_types, narrow_type, round_results, with_border
from export.staged import staged
from train.checkpoint import Checkpoint
from train.model import WanModel

TRANSPARENT = ("Cast", "QuantizeLinear", "DequantizeLinear")  # between an input and its product
OUTPUT = "output"  # of a block: the residual stream behind it
_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}


@dataclass(frozen=True)
class LayerError:
    """Relative L2 against float32 torch, the worst over all passes.

    Attributes:
        name: "blocks.3.ffn.down"; "blocks.3.output" is the residual stream behind the block.
        error: of its output, with all that came before.
        own: of its output against torch's on the very input that the engine gave it: what arises in it;
            None where that is not known: the stream, and inputs that are not finite.
    """

    name: str
    error: float
    own: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For reports; what is not finite is null."""
        return {"name": self.name, "error": short(self.error), "own": short(self.own)}


@dataclass(frozen=True)
class Tap:
    """Tensors of the graph at one layer: its output and, of a product, its input."""

    output: str
    input: str | None = None


def find_taps(graph: onnx.GraphProto) -> dict[str, Tap]:
    """Products of every block and the stream behind it, by name, in the order of the network.

    Raises:
        EngineError: the graph is not one of ours.
    """
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    products: dict[str, Tap] = {}
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        layer, found, _ = _origin(node.input[1], makers).partition(".weight")
        if found:
            (biased,) = readers[node.output[0]]
            products[layer] = Tap(biased.output[0], _origin(node.input[0], makers))
    taps: dict[str, Tap] = {}
    index = 0
    try:
        while not index or f"blocks.{index}.down" in products:
            for name in LAYERS:
                taps[f"blocks.{index}.{name}"] = products[
                    f"blocks.{index}.{name.removeprefix('ffn.')}"
                ]
            last = taps[f"blocks.{index}.ffn.down"].output
            taps[f"blocks.{index}.{OUTPUT}"] = Tap(_next_sum(last, readers))
            index += 1
        taps["head"] = products["head"]
    except KeyError as error:
        raise EngineError(
            f"{graph.name}: has no product with the weight {error.args[0]}.weight; build the engine again"
        ) from error
    return taps


def _origin(name: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """The tensor that `name` is another form of."""
    while name in makers and makers[name].op_type in TRANSPARENT:
        name = makers[name].input[0]
    return name


def _next_sum(name: str, readers: Mapping[str, list[onnx.NodeProto]]) -> str:
    """The first sum that a branch's result goes into: the residual stream behind it."""
    while True:
        (node,) = readers[name]
        name = node.output[0]
        if node.op_type == "Add":
            return name


@contextmanager
def exposed(path: Path, manifest: Manifest) -> Iterator[tuple[OrtEngine, dict[str, Tap]]]:
    """The engine at `path` with the tensors of its taps as outputs of the denoiser.

    Raises:
        EngineError: its graph is not one of ours, or cannot be opened.
    """
    model = onnx.load(path, load_external_data=False)
    taps = find_taps(model.graph)
    names = dict.fromkeys(n for tap in taps.values() for n in (tap.input, tap.output) if n)
    types = element_types(model)
    part = manifest.parts["denoiser"]
    more = {}
    for name in names:
        if types.get(name) not in _DTYPES:
            raise EngineError(f"{path}: the type of {name} is not known; build the engine again")
        if name not in part.outputs:
            more[name] = TensorSpec(_DTYPES[types[name]], (1, "T", "dim"))
            model.graph.output.append(helper.make_tensor_value_info(name, types[name], None))
    narrow = narrow_type(manifest)
    if narrow is not None:
        round_results(model, TYPES[narrow])
    needed = {
        name: entry
        for name, entry in manifest.parts.items()
        if name in ("denoiser", "weights", "time", "prompt")
    }
    needed["denoiser"] = replace(part, outputs={**part.outputs, **more})
    shown = with_border(replace(manifest, parts=needed, tokenizer=None, codec=None, sources={}))
    with staged(path, shown, {"denoiser": model}) as file:
        engine = open_engine(file, shown)
        try:
            yield engine, taps
        finally:
            engine.close()


class _Watched:
    """What torch's layers gave in the last pass."""

    def __init__(self, model: WanModel) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.linears: dict[str, list[nn.Linear]] = {}
        self._handles = []
        for i, block in enumerate(model.blocks):
            for name, sources in LAYERS.items():
                found = [cast(nn.Linear, block.get_submodule(source)) for source in sources]
                self._watch(f"blocks.{i}.{name}", found)
            self._handles.append(block.register_forward_hook(self._stream(f"blocks.{i}.{OUTPUT}")))
        self._watch("head", [model.head.head])

    def _watch(self, name: str, linears: list[nn.Linear]) -> None:
        self.linears[name] = linears
        # Layers side by side have one input.
        self._handles.append(linears[0].register_forward_pre_hook(self._given(name)))
        for index, linear in enumerate(linears):
            self._handles.append(linear.register_forward_hook(self._keep(f"{name}:{index}")))

    def _given(self, key: str) -> Any:
        return lambda _, inputs: self.inputs.__setitem__(key, inputs[0])

    def _keep(self, key: str) -> Any:
        return lambda _, inputs, output: self.outputs.__setitem__(key, output)

    def _stream(self, key: str) -> Any:
        return lambda _, inputs, output: self.outputs.__setitem__(key, output[0])

    def output(self, name: str) -> Array:
        """As the engine lays it out: [1, T, channels]."""
        if name in self.outputs:
            found = self.outputs[name]
        else:
            count = len(self.linears[name])
            found = torch.cat([self.outputs[f"{name}:{i}"] for i in range(count)], dim=-1)
        return found.reshape(1, -1, found.shape[-1]).numpy()

    def own_error(self, name: str, given: Array, output: Array) -> float:
        """Distance of an engine's output from torch's on the engine's input.

        An engine may scale the channels of an input before it quantises them, and undo that in the weight.
        Then only the input scaled back leads to its output; else only the input as it is.
        """
        linears = self.linears[name]
        expected = self.inputs[name].reshape(-1, linears[0].in_features).numpy()
        found = given.reshape(expected.shape).astype(np.float32)
        errors = []
        for x in (found, rescaled(found, expected)):
            made = torch.cat([linear(torch.from_numpy(x)) for linear in linears], dim=-1).numpy()
            errors.append(relative_l2(output.reshape(made.shape), made))
        return min(errors)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def rescaled(found: Array, expected: Array) -> Array:
    """`found` [T, channels] with each channel scaled so that it comes nearest to `expected`."""
    scale = (found * expected).sum(axis=0) / np.maximum((found * found).sum(axis=0), 1e-30)
    nearest: Array = found * scale
    return nearest


@torch.inference_mode()
def measure_layers(
    path: Path, manifest: Manifest, checkpoint: Checkpoint, model: WanModel
) -> list[LayerError]:
    """Errors of all products and blocks, in the order of the network, over the passes of the build's gate.

    Args:
        path: the denoiser of an ONNX engine, beside its other files.
        manifest: of the engine; a large network's with `latent_hw` None.
        checkpoint: what it was exported from.
        model: `checkpoint.build_model()`.

    Raises:
        EngineError: the graph does not name its layers as the exporter does.
    """
    worst: dict[str, LayerError] = {}
    watched = _Watched(model)
    try:
        with exposed(path, manifest) as (engine, taps):
            for case in checkpoint_cases(manifest, checkpoint, model):
                if case.part != "denoiser":
                    continue
                found = run_part(engine, "denoiser", case.inputs)
                for name, tap in taps.items():
                    here = _compare(name, tap, found, watched)
                    before = worst.get(name, here)
                    worst[name] = LayerError(
                        name, max(before.error, here.error), _larger(before.own, here.own)
                    )
    finally:
        watched.close()
    return list(worst.values())


def _compare(name: str, tap: Tap, found: Mapping[str, Array], watched: _Watched) -> LayerError:
    output = found[tap.output]
    error = relative_l2(output.reshape(1, -1, output.shape[-1]), watched.output(name))
    if tap.input is None:
        return LayerError(name, error)
    if not np.isfinite(found[tap.input]).all():
        return LayerError(name, error)
    return LayerError(name, error, watched.own_error(name, found[tap.input], output))


def _larger(one: float | None, other: float | None) -> float | None:
    known = [value for value in (one, other) if value is not None]
    return max(known) if known else None


def worst_layer(layers: list[LayerError]) -> str:
    """The layer to blame, in a few words: the first that is not finite, else where most arises."""
    for layer in layers:
        if not np.isfinite(layer.error):
            before = (
                "" if layer.own is not None or layer.name.endswith(OUTPUT) else "what goes into "
            )
            return f"{before}{layer.name} is the first that is not finite"
    own = [layer for layer in layers if layer.own is not None]
    if not own:
        return f"{max(layers, key=lambda layer: layer.error).name} is the worst layer"
    layer = max(own, key=lambda layer: layer.own or 0.0)
    return f"most arises in {layer.name} ({layer.own:.1e} of its output)"
