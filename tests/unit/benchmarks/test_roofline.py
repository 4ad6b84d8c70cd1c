"""The roofline: work counted by hand, kinds by name, one run of the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asd_rt.engines import PACKAGED_DIR
from asd_rt.manifest import read_manifest
from benchmarks.roofline import flops, kind_of_onnx, kind_of_openvino, main


def test_work_of_a_pass() -> None:
    manifest = read_manifest(
        PACKAGED_DIR / "asd_fp32.onnx"
    )  # dim 160, ffn 640, 6 layers, 24 channels
    found = flops(manifest, 48, 144)
    a_token = 6 * (6 * 160 * 160 + 2 * 160 * 640) + 2 * 96 * 160
    assert found["linear"] == 2 * 48 * a_token
    assert found["attention"] == 4 * 48 * 6 * 160 * (144 + 48 + 8)


def test_kinds() -> None:
    assert [kind_of_onnx(op) for op in ("MatMul", "Attention", "Add")] == [
        "linear",
        "attention",
        "rest",
    ]
    assert kind_of_openvino("FullyConnected", "x") == "linear"
    assert kind_of_openvino("Subgraph", "node_scaled_dot_product_attention_3") == "attention"
    assert kind_of_openvino("Subgraph", "node_add") == "rest"


def test_the_packaged_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = PACKAGED_DIR / "asd_fp32.onnx"
    assert main(["--engine", str(engine), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "roofline-asd_fp32.json").read_text())
    assert abs(sum(row["share"] for row in report["rows"]) - 1) < 1e-6
    assert abs(sum(row["ms"] for row in report["rows"]) / report["pass_ms"] - 1) < 1e-6
    assert all(row["share"] > 0 for row in report["rows"])
    loop = report["loop"]
    assert loop["passes"] == 2  # one step, and the cache pass
    assert 0 < loop["outside"] < 0.5
    assert loop["separate_ms"] > 0 < loop["joined_ms"]
    assert loop["moved"] == 1  # one block's worth leaves the window, and as much moves up
    assert "| linear |" in capsys.readouterr().out
