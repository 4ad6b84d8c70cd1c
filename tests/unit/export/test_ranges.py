"""fp16: layers that cannot hold what flows through them, named before and after they overflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from asd_rt.errors import EngineError
from export.build import main
from export.engine import NO_PARTS
from export.nonfinite import check_finite, first_nonfinite
from export.ranges import choose_float32
from export.settings import FixedPlan, Overrides, make_manifest, resolve
from train.checkpoint import load_checkpoint, save_checkpoint
from train.model import WanModel

Spoil = Callable[[WanModel], None]


def spoiled(student: Path, folder: Path, spoil: Spoil) -> Path:
    """`student` with other weights."""
    checkpoint = load_checkpoint(student)
    model = checkpoint.build_model()
    with torch.no_grad():
        spoil(model)
    config, told = checkpoint.config, checkpoint.deployment
    save_checkpoint(folder, config, model.state_dict(), told, checkpoint.codec, checkpoint.table)
    return folder


def scale_values(model: WanModel) -> None:
    model.blocks[0].self_attn.v.weight *= 1e6


def scale_feed_forward(model: WanModel) -> None:
    """Values of 1e6 between the two linear layers, and nothing of it behind them."""
    model.blocks[0].ffn[0].weight *= 1e6
    model.blocks[0].ffn[2].weight /= 1e6


def test_a_weight_that_makes_float16_overflow_fails_the_build_with_its_layer(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = spoiled(student, tmp_path / "bad", scale_values)
    words = ["--checkpoint", str(bad), "--target", "onnx", "--precision", "fp16"]
    assert main([*words, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "blocks.0.self_attn.v reaches" in error and "use bf16" in error
    assert not list(tmp_path.glob("asd_fp16*"))


def test_products_that_float16_cannot_hold_stay_in_float32(student: Path, tmp_path: Path) -> None:
    bad = spoiled(student, tmp_path / "bad", scale_feed_forward)
    words = ["--checkpoint", str(bad), "--target", "onnx", "--precision", "fp16"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "asd_fp16.onnx.json").read_text())["parity"]["fp16"]
    assert figures["float32_layers"] == ["blocks.0.ffn.up", "blocks.0.ffn.down"]
    assert figures["largest"]["blocks.0.ffn.down input"] > 65504
    assert "residual stream" in figures["always_float32"]
    graph = onnx.load(tmp_path / "asd_fp16.onnx", load_external_data=False).graph
    types = {tensor.name.removesuffix(".fp16"): tensor.data_type for tensor in graph.initializer}
    assert types["blocks.0.up.weight"] == TensorProto.FLOAT
    assert types["blocks.0.self_attn.qkv.weight"] == TensorProto.FLOAT16


def test_ranges_of_a_good_student_keep_nothing(student: Path) -> None:
    checkpoint = load_checkpoint(student)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    manifest = make_manifest(checkpoint, settings, "fp16", "onnx", NO_PARTS)
    model = checkpoint.build_model()
    scheme = choose_float32(checkpoint, model, manifest)
    assert scheme.wide == ()
    largest = scheme.to_json()["largest"]
    for part in ("self_attn scores, at most", "residual stream", "ffn.down input", "self_attn.v"):
        key = f"blocks.0.{part}" if "residual" not in part else f"blocks.0 {part}"
        assert 0 < largest[key] < 65504
    assert not any(module._forward_hooks for module in model.modules())


def test_the_first_layer_that_is_not_finite_is_named(tmp_path: Path) -> None:
    def matrix(name: str, value: float) -> TensorProto:
        return numpy_helper.from_array(np.full((4, 4), value, np.float16), name)

    names = ["blocks.0.self_attn.o.weight", "blocks.1.up.weight", "blocks.1.down.weight"]
    nodes = [
        helper.make_node("MatMul", [given, name], [made])
        for given, name, made in zip("xab", names, "aby", strict=True)
    ]
    weights = [matrix(n, v) for n, v in zip(names, (1.0, 6e4, 1.0), strict=True)]
    shape = (TensorProto.FLOAT16, [1, 4])
    x, y = (helper.make_tensor_value_info(name, *shape) for name in "xy")
    graph = helper.make_graph(nodes, "denoiser", [x], [y], weights)
    path = tmp_path / "asd_fp16.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    feeds = {"x": np.ones((1, 4), np.float16)}
    assert first_nonfinite(path, feeds).startswith("MatMul of layer blocks.1.ffn.up (float16")
    bad = {"y": np.full((1, 4), np.inf, np.float16)}
    with pytest.raises(
        EngineError, match=r"y not finite; the first is MatMul of layer blocks\.1\.ffn\.up"
    ):
        check_finite(path, feeds, bad)
    assert first_nonfinite(path, {"x": np.zeros((1, 4), np.float16)}) == ""
    check_finite(path, feeds, {"y": np.zeros((1, 4), np.float16)})
    assert [file.name for file in tmp_path.iterdir()] == ["asd_fp16.onnx"]
