"""How weights of a text encoder are stored: one file, written tensor by tensor, never held as a whole.

Matrices are float32, float16, or int8 with one scale per output channel (per row of the embedding); norms and
position tables, which are small, stay float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from asd_rt.errors import CheckpointError
from export.onnx import dtype_name
from export.parts import TensorShape
from export.umt5 import TABLE, is_matrix
from export.umt5_source import Umt5Source
from export.weights import ALIGN_BYTES

PRECISIONS = ("fp32", "fp16", "int8")
ROWS = 4096  # converted at a time
_STORED = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
_ONNX = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int8: TensorProto.INT8,
}


def stored_tensors(source: Umt5Source, precision: str) -> dict[str, TensorShape]:
    """Type and shape of everything in the weights file, in its order."""
    found: dict[str, TensorShape] = {}
    for name, shape in source.config.shapes().items():
        found[name] = (_STORED[precision] if is_matrix(name) else torch.float32, shape)
        if precision == "int8" and is_matrix(name):
            scales = (shape[0], 1) if name == TABLE else (shape[1],)
            found[f"{name}.scale"] = (torch.float32, scales)
    return found


class TensorFile:
    """Tensors one behind the other; hashed as they are written, since reading gigabytes again takes long."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.places: dict[str, tuple[int, int]] = {}
        self._digest = hashlib.sha256()

    def __enter__(self) -> TensorFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rename(self, name: str) -> None:
        """Give the finished file another name in its folder."""
        self.path = self.path.rename(self.path.with_name(name))

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, name: str, pieces: Iterator[Tensor]) -> None:
        """Write a tensor, given as pieces of whole rows."""
        self._put(bytes(-self.size % ALIGN_BYTES))
        begin = self.size
        for piece in pieces:
            self._put(piece.contiguous().numpy().data.cast("B"))
        self.places[name] = begin, self.size - begin

    def _put(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)


def store(source: Umt5Source, name: str, precision: str, weights: TensorFile) -> None:
    """Write one weight, and its scales where it has some."""
    value = source[name]

    def rows() -> Iterator[Tensor]:
        for begin in range(0, len(value), ROWS):
            wide = value[begin : begin + ROWS].float()
            if not torch.isfinite(wide).all():
                raise CheckpointError(f"{source.name}: infinite or not-a-number values in {name}")
            yield wide

    if not is_matrix(name) or precision == "fp32":
        weights.add(name, rows())
    elif precision == "fp16":
        weights.add(name, (_half(source, name, piece) for piece in rows()))
    elif name == TABLE:
        scales = [_scale(piece.abs().amax(dim=1, keepdim=True)) for piece in rows()]
        pairs = zip(rows(), scales, strict=True)
        weights.add(name, (_whole(piece / scale) for piece, scale in pairs))
        weights.add(f"{name}.scale", iter(scales))
    else:
        largest = torch.stack([piece.abs().amax(dim=0) for piece in rows()]).amax(dim=0)
        scale = _scale(largest)
        weights.add(name, (_whole(piece / scale) for piece in rows()))
        weights.add(f"{name}.scale", iter([scale]))


def _half(source: Umt5Source, name: str, piece: Tensor) -> Tensor:
    half = piece.half()
    if torch.isinf(half).any():
        raise CheckpointError(
            f"{source.name}: {name} has values too large for float16; use --text-precision fp32"
        )
    return half


def _scale(largest: Tensor) -> Tensor:
    """Scale that takes values up to `largest` to -127..127; 1 where all are zero."""
    return torch.where(largest > 0, largest / 127, torch.ones(()))


def _whole(scaled: Tensor) -> Tensor:
    return scaled.round().clamp(-127, 127).to(torch.int8)


def read_from(graph: onnx.ModelProto, weights: TensorFile, stored: dict[str, TensorShape]) -> None:
    """Turn the inputs that stand for weights into references to the file."""
    given = [value for value in graph.graph.input if value.name not in stored]
    del graph.graph.input[:]
    graph.graph.input.extend(given)
    for name, (dtype, shape) in stored.items():
        offset, length = weights.places[name]
        tensor = graph.graph.initializer.add(
            name=name, data_type=_ONNX[dtype], dims=shape, data_location=TensorProto.EXTERNAL
        )
        for key, value in (
            ("location", weights.path.name),
            ("offset", offset),
            ("length", length),
        ):
            tensor.external_data.add(key=key, value=str(value))


class StoredWeights(Mapping[str, Tensor]):
    """The weights in the file, as they are stored."""

    def __init__(self, weights: TensorFile, stored: Mapping[str, TensorShape]) -> None:
        self._weights, self._stored = weights, stored

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape = self._stored[name]
        offset, _ = self._weights.places[name]
        sizes = tuple(size for size in shape if isinstance(size, int))
        # Copy on write, since torch takes no memory that is read-only.
        mapped: np.memmap[Any, np.dtype[Any]] = np.memmap(
            self._weights.path, dtype_name(dtype), "c", offset, sizes
        )
        return torch.from_numpy(mapped)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
