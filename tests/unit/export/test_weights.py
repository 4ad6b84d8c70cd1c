"""Weights of several graphs in one file: shared, aligned, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.weights import ALIGN_BYTES, MIN_BYTES, share_weights


def model(*arrays: np.ndarray) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(arrays)]
    nodes = [helper.make_node("Identity", [t.name], [f"out_{t.name}"]) for t in tensors]
    outputs = [helper.make_empty_tensor_value_info(f"out_{t.name}") for t in tensors]
    return helper.make_model(helper.make_graph(nodes, "g", [], outputs, tensors))


def test_what_two_graphs_share_is_stored_once_and_comes_back(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    common, own = (draw.standard_normal(size).astype(np.float32) for size in (1001, 700))
    small = np.arange(3, dtype=np.float32)
    models = [model(common, small), model(own, common)]
    share_weights(models, tmp_path / "all.weights")
    size = (tmp_path / "all.weights").stat().st_size
    assert common.nbytes + own.nbytes <= size < common.nbytes + own.nbytes + 2 * ALIGN_BYTES
    for i, (graph, wanted) in enumerate(zip(models, [(common, small), (own, common)], strict=True)):
        path = tmp_path / f"{i}.onnx"
        path.write_bytes(graph.SerializeToString())
        assert path.stat().st_size < MIN_BYTES
        found = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
        for array, expected in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(array, expected)
    references = [t for graph in models for t in graph.graph.initializer if t.external_data]
    offsets = [int(e.value) for t in references for e in t.external_data if e.key == "offset"]
    assert len(offsets) == 3
    assert all(offset % ALIGN_BYTES == 0 for offset in offsets)


def test_the_same_graphs_give_the_same_bytes(tmp_path: Path) -> None:
    array = np.random.default_rng(1).standard_normal(999).astype(np.float32)
    for name in ("a", "b"):
        share_weights([model(array)], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
