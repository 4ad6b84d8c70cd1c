"""The engine inside the package is what the shipped student exports to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from asd_rt.engines import PACKAGED_DIR, list_engines

MEND = "asd_rt/engine is not what train/tiny_student exports to; build it again: make engine"


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


def test_packaged_engine_is_the_shipped_students(module: Callable[..., Any], out: Path) -> None:
    engines = list_engines(PACKAGED_DIR)
    assert len(engines) == 1, "one engine belongs into asd_rt/engine: make engine"
    packaged = engines[0]
    words = ("--steps", "1", "--target", "onnx", "--precision", "fp32", "--out", out)
    built = module("export.build", *words)
    assert built.code == 0, built.stderr
    manifests = [json.loads(Path(f"{p}.json").read_text()) for p in (packaged, out / packaged.name)]
    names = ("model", "cache", "latent_hw", "step_lists", "default_plan", "tokenizer", "checkpoint")
    for name in names:
        assert manifests[0][name] == manifests[1][name], f"{name}: {MEND}"
    assert manifests[0]["parts"].keys() == manifests[1]["parts"].keys(), MEND
    for name, part in manifests[0]["parts"].items():
        if name == "weights":  # read through the graphs that refer to it
            continue
        old, new = content(packaged.parent / part["file"]), content(out / part["file"])
        assert old == new, f"{part['file']}: {MEND}"
    total = sum(part["bytes"] for part in manifests[0]["parts"].values())
    assert total <= 8_000_000, "the packaged engine is meant to be small"
