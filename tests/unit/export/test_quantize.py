"""int8: rounding, the layers that are left alone, and an engine that is built and played."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asd_rt
from export.build import main
from export.calibrate import choose_scheme
from export.engine import NO_PARTS
from export.metrics import relative_l2
from export.quantize import FP8, LAYERS, LEVELS, fake_quantize, quantize_weight
from export.settings import FixedPlan, Overrides, make_manifest, resolve
from train.checkpoint import load_checkpoint


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.floats(1e-6, 1e6))
def test_a_weight_is_within_half_a_level_of_itself(seed, rows, columns, size) -> None:
    weight = torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * size
    values, scale = quantize_weight(weight)
    assert values.dtype == torch.int8 and values.abs().max() == LEVELS
    assert bool(((values * scale - weight).abs() <= scale * 0.501).all())


def test_a_channel_of_zeros_stays_zero() -> None:
    values, scale = quantize_weight(torch.tensor([[0.0, 2.0], [0.0, -1.0]]))
    assert values.tolist() == [[0, 127], [0, -64]] and scale[0] == 1


@given(st.floats(-1000, 1000), st.floats(0.5, 10))
def test_fp8_has_four_bits_and_clips(x, scale) -> None:
    found = float(fake_quantize(torch.tensor(x), scale, FP8))
    expected = max(-448 * scale, min(448 * scale, x))
    assert abs(found - expected) <= max(abs(expected) / 16, scale * 2**-10) * 1.001


@given(st.floats(-1000, 1000), st.floats(0.01, 10))
def test_inputs_are_rounded_and_clipped(x, scale) -> None:
    found = float(fake_quantize(torch.tensor(x), scale))
    expected = max(-LEVELS * scale, min(LEVELS * scale, x))
    assert abs(found - expected) <= scale * 0.501


@pytest.mark.parametrize(("budget", "kept"), [(10.0, 0), (0.0, len(LAYERS))])
def test_layers_are_kept_as_the_budget_needs(student: Path, budget: float, kept: int) -> None:
    checkpoint = load_checkpoint(student)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    manifest = make_manifest(checkpoint, settings, "int8", "onnx", NO_PARTS)
    model = checkpoint.build_model()
    scheme = choose_scheme(checkpoint, model, manifest, budget)
    assert len(scheme.kept) == kept
    assert set(scheme.kept).isdisjoint(scheme.input_scales)
    assert {*scheme.kept, *scheme.input_scales} == {f"blocks.0.{name}" for name in LAYERS}
    assert not any(module._forward_hooks for module in model.modules())


def test_the_layer_that_int8_spoils_is_the_one_kept(student: Path) -> None:
    checkpoint = load_checkpoint(student)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    manifest = make_manifest(checkpoint, settings, "int8", "onnx", NO_PARTS)
    model = checkpoint.build_model()
    with torch.no_grad():  # one huge channel that nothing reads: its range drowns all others
        model.blocks[0].ffn[0].weight[0], model.blocks[0].ffn[0].bias[0] = 0, 1e4
        model.blocks[0].ffn[2].weight[:, 0] = 0
    alone = choose_scheme(checkpoint, model, manifest, 10.0).figures["simulated_pass"]
    scheme = choose_scheme(checkpoint, model, manifest, alone / 2)
    assert scheme.kept == ("blocks.0.ffn.down",)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_an_engine_is_built_and_played(
    precision: str, student: Path, built: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is for x86-64 alone")
    words = ["--checkpoint", str(student), "--target", "onnx", "--precision", precision]
    assert main([*words, "--out", str(tmp_path)]) == 0
    engine = tmp_path / f"asd_{precision}.onnx"
    draw = np.random.default_rng(0)
    noise = draw.standard_normal((1, 8, 2, 4, 2)).astype(np.float32)
    context = draw.standard_normal((1, 4, 3)).astype(np.float32)
    with asd_rt.open(built / "asd_fp32.onnx") as session:
        expected = session.replay(noise, context).latents
    with asd_rt.open(engine) as session:
        error = relative_l2(session.replay(noise, context).latents, expected)
    assert 1e-6 < error < 0.2
    parity = json.loads(engine.with_suffix(".onnx.json").read_text())["parity"]
    graph = onnx.load(engine, load_external_data=False).graph
    stored = [
        t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2
    ]
    if precision == "int8":
        assert len(stored) == parity["int8"]["int8_layers"] == len(LAYERS)
        assert parity["int8"]["kept"] == []
    else:
        assert not stored
