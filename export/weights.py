"""One file of weights for all parts of an engine: what two parts have in common is stored once.

Weights go from the network to the file one by one, before a graph becomes bytes: no graph ever holds them, so
its own size stays far from the 2 GB at which a protobuf file ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

MIN_BYTES = 1024  # smaller tensors stay in their graph, which shape inference may want to read
ALIGN_BYTES = 64


class Place(NamedTuple):
    """Where a tensor's bytes lie in the file."""

    offset: int
    length: int


class WeightsFile:
    """The file being written; the same arrays in the same order give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[str, Place] = {}
        self._out = path.open("wb")

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._out.close()

    def add(self, array: NDArray[Any]) -> Place:
        """Write `array` (of any element type, C order), unless its bytes are there already."""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._where:
            self._out.write(bytes(-self._out.tell() % ALIGN_BYTES))
            self._where[digest] = Place(self._out.tell(), content.nbytes)
            self._out.write(content)
        return self._where[digest]


def name_weights(models: Iterable[onnx.ModelProto], file: Path) -> None:
    """Let `models` find their weights in `file`, which was renamed."""
    for model in models:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = file.name
