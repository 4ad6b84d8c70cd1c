"""Which layer of a graph is the first to give infinities or NaNs: it runs again, with everything shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from asd_rt.errors import EngineError

Array = NDArray[Any]
# Modules of `export.denoiser` whose layers have another name.
_RENAMED = {".up": ".ffn.up", ".down": ".ffn.down"}


def check_finite(path: Path, feeds: Mapping[str, Array], found: Mapping[str, Array]) -> None:
    """Refuse results that hold infinities or NaNs.

    Args:
        path: the graph that gave them, its weights beside it.
        feeds: what it was given, finite.
        found: what it gave, by name.

    Raises:
        EngineError: names the first layer, in the order in which they run, whose output is not finite.
    """
    bad = [name for name, value in found.items() if not np.isfinite(value).all()]
    if not bad:
        return
    culprit = first_nonfinite(path, feeds)
    where = f"; the first is {culprit}" if culprit else ""
    raise EngineError(
        f"{path.name}: {', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''} not finite{where}; "
        "build with --precision bf16 or fp32, or look for weights that overflow there"
    )


def first_nonfinite(path: Path, feeds: Mapping[str, Array]) -> str:
    """First operator of a graph whose output is not finite, with its layer; "" if there is none."""
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.output]
    held = {value.name for value in model.graph.output}
    shown = [name for node in nodes for name in node.output if name and name not in held]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown)
    options = ort.SessionOptions()
    # As written: fused operators would hide what they hold between them.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with TemporaryDirectory(dir=path.parent) as folder:
        probe = Path(folder) / path.name
        for name in {_external_file(t) for t in model.graph.initializer} - {""}:
            (Path(folder) / name).hardlink_to(path.parent / name)
        onnx.save(model, probe)
        session = ort.InferenceSession(probe, options, providers=["CPUExecutionProvider"])
        names = [name for node in nodes for name in node.output if name]
        values = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    layer = ""
    for node in nodes:
        layer = next((_layer_of(name) for name in node.input if _layer_of(name)), layer)
        for name in node.output:
            value = values.get(name)
            if value is None or value.dtype.kind != "f" or np.isfinite(value).all():
                continue
            largest = float(np.abs(value[np.isfinite(value)]).max(initial=0.0))
            at = layer or "(before any)"
            return f"{node.op_type} of layer {at} ({value.dtype}; the rest reaches {largest:.3g})"
    return ""


def _external_file(tensor: onnx.TensorProto) -> str:
    return next((x.value for x in tensor.external_data if x.key == "location"), "")


def _layer_of(name: str) -> str:
    """Layer of a weight, blocks.0.up.weight.fp16 -> blocks.0.ffn.up; "" for what is no layer's."""
    if not name.startswith(("blocks.", "patch.", "head.", "first.", "last.", "projection.")):
        return ""
    layer = name.split(".weight")[0].split(".bias")[0]
    for old, new in _RENAMED.items():
        if layer.endswith(old):
            return layer.removesuffix(old) + new
    return layer
