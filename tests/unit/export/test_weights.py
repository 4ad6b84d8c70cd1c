"""Weights of several graphs in one file: shared, aligned, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from export.onnx import export_part, serialize
from export.parts import PartModule
from export.weights import ALIGN_BYTES, MIN_BYTES, WeightsFile


class Product(nn.Module):
    """x @ weight + bias, and a second product."""

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


def matrix(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def part(*weights: torch.Tensor) -> PartModule:
    shapes = [("B", w.shape[i]) for w, i in ((weights[0], 0), (weights[-1], 1))]
    inputs, outputs = (
        {name: (torch.float32, shape)} for name, shape in zip("xy", shapes, strict=True)
    )
    return PartModule(Product(*weights).eval().requires_grad_(False), inputs, outputs)


def export(folder: Path, parts: dict[str, PartModule], rounded: str = "") -> dict[str, Path]:
    files = {}
    with WeightsFile(folder / "all.weights") as weights:
        for name, module in parts.items():
            files[name] = folder / f"{name}.onnx"
            graph = export_part(name, module, 18, weights, rounded)
            files[name].write_bytes(serialize(graph))
    return files


COMMON, OWN, SMALL = matrix(0, 40, 50), matrix(1, 50, 30), matrix(2, 30, 3)


def test_what_two_parts_share_is_stored_once_and_comes_back(tmp_path: Path) -> None:
    wanted = {"a": [COMMON, OWN], "b": [COMMON], "c": [OWN, SMALL]}
    files = export(tmp_path, {name: part(*weights) for name, weights in wanted.items()})
    size = (tmp_path / "all.weights").stat().st_size
    once = 4 * (COMMON.numel() + OWN.numel())
    assert once <= size < once + 2 * ALIGN_BYTES
    offsets = set()
    for name, weights in wanted.items():
        assert files[name].stat().st_size < 2 * MIN_BYTES
        onnx.checker.check_model(files[name])
        graph = onnx.load(files[name], load_external_data=False).graph
        for tensor in graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            assert bool(where) == (np.prod(tensor.dims) * 4 >= MIN_BYTES)
            if where:
                assert where["location"] == "all.weights"
                assert int(where["offset"]) % ALIGN_BYTES == 0
                offsets.add(int(where["offset"]))
        found = [numpy_helper.to_array(t) for t in onnx.load(files[name]).graph.initializer]
        for weight, array in zip(weights, found, strict=True):
            np.testing.assert_array_equal(array, weight.numpy())
    assert len(offsets) == 2


def test_a_transposed_view_is_stored_in_the_order_of_its_shape(tmp_path: Path) -> None:
    (file,) = export(tmp_path, {"a": part(OWN.t())}).values()
    (found,) = (numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer)
    np.testing.assert_array_equal(found, OWN.t().numpy())


@pytest.mark.parametrize(
    ("rounded", "kind", "dtype"),
    [
        ("bf16", TensorProto.BFLOAT16, torch.bfloat16),
        ("fp16", TensorProto.FLOAT16, torch.float16),
    ],
)
def test_rounded_weights_take_half_the_bytes_and_a_cast(
    tmp_path: Path, rounded: str, kind: int, dtype: torch.dtype
) -> None:
    (file,) = export(tmp_path, {"a": part(COMMON)}, rounded).values()
    assert (tmp_path / "all.weights").stat().st_size == 2 * COMMON.numel()
    graph = onnx.load(file).graph
    (tensor,) = graph.initializer
    assert tensor.data_type == kind
    cast = next(node for node in graph.node if node.op_type == "Cast")
    assert cast.input[0] == tensor.name
    expected = COMMON.to(dtype).float().numpy()
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.float32), expected)


def test_exact_halves_are_found_without_being_asked_for(tmp_path: Path) -> None:
    export(tmp_path, {"a": part(COMMON.half().float())})
    assert (tmp_path / "all.weights").stat().st_size == 2 * COMMON.numel()


def test_the_same_parts_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        export(tmp_path / name, {"a": part(COMMON, OWN), "b": part(OWN)})
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
