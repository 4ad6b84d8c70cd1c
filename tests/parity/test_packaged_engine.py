"""The engine inside the package is what the shipped student exports to: byte for byte with the same tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from asd_rt.engines import PACKAGED_DIR, list_engines
from asd_rt.manifest import read_manifest, verify
from export.build import main

pytestmark = pytest.mark.slow  # the shipped student is the largest network here

MEND = "asd_rt/engine is not what train/tiny_student exports to; build it again: make engine"
LARGEST_BYTES = 8_000_000


def content(path: Path) -> tuple[list[Any], dict[str, bytes]]:
    """What a graph computes: its nodes, and its weights by name. Names of tools and authors are left out."""
    graph = onnx.load(path).graph
    nodes = [
        (
            node.op_type,
            tuple(node.input),
            tuple(node.output),
            sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute),
        )
        for node in graph.node
    ]
    weights = {w.name: onnx.numpy_helper.to_array(w).tobytes() for w in graph.initializer}
    return nodes, weights


def test_packaged_engine_is_the_shipped_students(tmp_path: Path) -> None:
    engines = list_engines(PACKAGED_DIR)
    assert len(engines) == 1, "one engine belongs into asd_rt/engine: make engine"
    packaged = engines[0]
    shipped = read_manifest(packaged)
    verify(packaged, shipped)
    assert main(["--steps", "1", "--target", "onnx", "--out", str(tmp_path)]) == 0
    found = read_manifest(tmp_path / packaged.name)
    apart = {"parts", "parity", "tools"}
    old, new = (
        {k: v for k, v in manifest.to_json().items() if k not in apart}
        for manifest in (shipped, found)
    )
    assert new == old, MEND
    assert found.parts.keys() == shipped.parts.keys(), MEND
    for name, part in shipped.parts.items():
        if name == "weights":  # read through the graphs that refer to it
            continue
        made = tmp_path / found.parts[name].file
        assert content(packaged.parent / part.file) == content(made), f"{part.file}: {MEND}"
    if found.tools == shipped.tools:
        assert found.parts == shipped.parts, MEND
    assert sum(part.bytes for part in shipped.parts.values()) <= LARGEST_BYTES
