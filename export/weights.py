"""One file of weights for all parts of an ONNX engine: what two parts have in common is stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import TensorProto

MIN_BYTES = 1024  # smaller tensors stay in their graph, which shape inference may want to read
ALIGN_BYTES = 64


def share_weights(models: Iterable[onnx.ModelProto], file: Path) -> None:
    """Move the large tensors of `models` into `file` and leave references, relative to its folder.

    The same models give the same bytes.
    """
    where: dict[str, int] = {}
    with file.open("wb") as out:
        for model in models:
            for tensor in model.graph.initializer:
                content = tensor.raw_data
                if len(content) < MIN_BYTES:
                    continue
                digest = hashlib.sha256(content).hexdigest()
                if digest not in where:
                    out.write(bytes(-out.tell() % ALIGN_BYTES))
                    where[digest] = out.tell()
                    out.write(content)
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (
                    ("location", file.name),
                    ("offset", where[digest]),
                    ("length", len(content)),
                ):
                    tensor.external_data.add(key=key, value=str(value))


def name_weights(models: Iterable[onnx.ModelProto], file: Path) -> None:
    """Let `models` find their shared weights in `file`, which was renamed."""
    for model in models:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = file.name
