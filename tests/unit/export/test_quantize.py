"""int8: rounding, the layers that are left alone, and an engine that is built and played."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asd_rt
from asd_rt.backends.base import FloatArray
from asd_rt.config import ModelConfig
from asd_rt.errors import EngineError
from asd_rt.schedule import Schedule
from export.build import main
from export.calibrate import choose_scheme
from export.engine import NO_PARTS
from export.lowering import LOWERINGS
from export.metrics import relative_l2
from export.onnx import export_part, serialize
from export.parity import BUDGETS
from export.parts import engine_parts
from export.quantize import (
    FP8,
    LAYERS,
    LEVELS,
    SMOOTHED,
    Scheme,
    Wish,
    fake_quantize,
    layer_names,
    quantize_weight,
)
from export.reference import TorchDenoiser
from export.rollouts import VIDEOS, play_rollouts
from export.settings import FixedPlan, Overrides, make_manifest, resolve
from export.weights import WeightsFile
from train.checkpoint import load_checkpoint, save_checkpoint
from train.model import WanModel


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
    assert len(scheme.kept) == kept and not scheme.weight_only
    assert set(scheme.kept).isdisjoint(scheme.input_scales)
    assert {*scheme.kept, *scheme.input_scales} == {f"blocks.0.{name}" for name in LAYERS}
    assert set(scheme.divisors) <= set(scheme.input_scales)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_layer_that_int8_spoils_gets_its_inputs_back(student: Path) -> None:
    checkpoint = load_checkpoint(student)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    manifest = make_manifest(checkpoint, settings, "int8", "onnx", NO_PARTS)
    model = checkpoint.build_model()
    with torch.no_grad():  # one large channel that nothing reads: its range drowns all others
        model.blocks[0].ffn[0].weight[0], model.blocks[0].ffn[0].bias[0] = 0, 100
        model.blocks[0].ffn[2].weight[:, 0] = 0
    alone = choose_scheme(checkpoint, model, manifest, 10.0).figures["simulated_pass"]
    scheme = choose_scheme(checkpoint, model, manifest, alone / 2)
    assert scheme.weight_only == ("blocks.0.ffn.down",) and not scheme.kept


def test_outlier_channels_fail_with_every_layer_and_what_to_do(student: Path) -> None:
    checkpoint = load_checkpoint(student)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    manifest = make_manifest(checkpoint, settings, "int8", "onnx", NO_PARTS)
    model = checkpoint.build_model()
    with torch.no_grad():
        model.blocks[0].ffn[0].weight[3], model.blocks[0].ffn[0].bias[3] = 0, 1e4
    named = r"blocks\.0\.ffn\.down \(input channel 3 reaches 1e\+04, \d+ times the middle one\)"
    with pytest.raises(EngineError, match=f"{named}.*--keep-layers blocks.0.ffn.down$"):
        choose_scheme(checkpoint, model, manifest, 10.0)
    for wish in (Wish(("blocks.0.ffn.down",)), Wish(activations="float")):
        assert choose_scheme(checkpoint, model, manifest, 10.0, wish=wish)
    assert choose_scheme(checkpoint, model, manifest, 10.0, form=FP8).input_scales  # a float


def test_layers_are_kept_by_hand(student: Path) -> None:
    checkpoint = load_checkpoint(student)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    manifest = make_manifest(checkpoint, settings, "int8", "onnx", NO_PARTS)
    wish = Wish(("blocks.0.ffn.up",), "float")
    scheme = choose_scheme(checkpoint, checkpoint.build_model(), manifest, 10.0, wish=wish)
    assert scheme.kept == wish.keep and not scheme.input_scales
    assert set(scheme.weight_only) == {f"blocks.0.{n}" for n in LAYERS} - set(wish.keep)
    assert scheme.to_json()["asked"] == {"keep": ["blocks.0.ffn.up"], "activations": "float"}


def test_unknown_layers_are_refused_with_the_nearest(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(student), "--target", "onnx"]
    assert main([*words, "--precision", "int8", "--int8-keep", "blocks.0.fnn.down"]) == 1
    error = capsys.readouterr().err
    assert "--keep-layers blocks.0.fnn.down: no such layer among 6" in error
    assert "blocks.0.ffn.down" in error and error.count("\n") == 1
    assert main([*words, "--int8-activations", "float"]) == 1
    assert "--precision int8" in capsys.readouterr().err
    assert main([*words, "--precision", "fp16", "--keep-layers", "blocks.0.ffn.up"]) == 1
    assert "--keep-layers is for --precision int8 or fp8" in capsys.readouterr().err


def smoothed_scheme(model: WanModel) -> Scheme:
    """Every layer that can be is divided by something far from 1."""
    draw = torch.Generator().manual_seed(3)
    dim = model.config.dim
    names = [n for n in layer_names(model.config.num_layers) if n.split(".", 2)[2] in SMOOTHED]
    divisors = {name: torch.exp(torch.randn(dim, generator=draw)) for name in names}
    return Scheme(divisors=divisors)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_smoothing_changes_nothing_in_floating_point(
    student: Path, joined: bool, fused: bool
) -> None:
    checkpoint = load_checkpoint(student)
    model, lowering = checkpoint.build_model(), LOWERINGS["openvino"]
    if fused:
        lowering = LOWERINGS["onnxruntime"]
    draw = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}
    found = []
    for scheme in (None, smoothed_scheme(model)):
        parts = engine_parts(checkpoint, model, "fp32", (4, 2), lowering, scheme)
        part = parts["joined" if joined else "denoiser"]
        sizes = {"F": 2, "T": 4, "P": 3, "S": 7}
        for name, (dtype, shape) in part.inputs.items():
            size = [sizes.get(n, n) for n in shape]
            if name not in inputs:
                inputs[name] = (
                    torch.ones(size, dtype=dtype)
                    if dtype == torch.bool
                    else torch.randn(size, generator=draw)
                )
        if fused:
            graph = export_part("joined" if joined else "denoiser", part, lowering.opset)
            session = ort.InferenceSession(serialize(graph), providers=["CPUExecutionProvider"])
            found.append(session.run(None, {k: v.numpy() for k, v in inputs.items()}))
        else:
            found.append([x.numpy() for x in part.module(*inputs.values())])
    assert max(relative_l2(b, a) for a, b in zip(*found, strict=True)) < 1e-5


def test_smoothing_is_chosen_where_a_channel_drowns_the_others(student: Path) -> None:
    checkpoint = load_checkpoint(student)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    manifest = make_manifest(checkpoint, settings, "int8", "onnx", NO_PARTS)
    model = checkpoint.build_model()
    with torch.no_grad():  # one channel a thousand times as large, and its weights as much smaller
        model.blocks[0].norm3.weight[5] *= 1000
        model.blocks[0].cross_attn.q.weight[:, 5] /= 1000
    scheme = choose_scheme(checkpoint, model, manifest, 10.0)
    divisor = scheme.divisors["blocks.0.cross_attn.q"]
    assert divisor.argmax() == 5 and divisor[5] > 30 * divisor.median()
    assert scheme.figures["simulated_pass"] < 0.1


def test_rollouts_visit_all_timesteps_and_a_full_window_one_pass_at_a_time(student: Path) -> None:
    checkpoint = load_checkpoint(student)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 4))
    manifest = make_manifest(checkpoint, settings, "int8", "onnx", NO_PARTS)
    seen: list[tuple[float, int]] = []
    inputs: set[bytes] = set()
    alive: list[int] = []
    flows: list[weakref.ref[np.ndarray]] = []

    class Watching(TorchDenoiser):
        def set_prompt(self, context: FloatArray) -> None:
            inputs.add(context.tobytes())
            super().set_prompt(context)

        def denoise(
            self, latents: FloatArray, timestep: float, frames: range, past_frames: int
        ) -> FloatArray:
            seen.append((timestep, past_frames))
            flow = super().denoise(latents, timestep, frames, past_frames)
            flows.append(weakref.ref(flow))
            alive.append(sum(ref() is not None for ref in flows))
            return flow

    play_rollouts(checkpoint, manifest, Watching(checkpoint.build_model()), "test", 0)
    schedule = Schedule(manifest.timestep_shift)
    wanted = {step.timestep for count in (1, 2, 3, 4) for step in schedule.steps(count)}
    assert {timestep for timestep, _ in seen} == {0.0, *wanted}
    full = manifest.cache.window_frames - manifest.cache.block_frames
    assert {timestep for timestep, past in seen if past == full} == {0.0, *wanted}
    assert sum(past == full for _, past in seen) > 3 * VIDEOS  # the window rolls
    assert len(inputs) > 1
    assert max(alive) <= 4 < len(flows)  # passes are let go, however many there are


@pytest.mark.parametrize("precision", ["bf16", "int8", "int8 float"])
def test_an_engine_is_built_and_played(
    precision: str, student: Path, built: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is for x86-64 alone")
    precision, _, activations = precision.partition(" ")
    words = ["--checkpoint", str(student), "--target", "onnx", "--precision", precision]
    if activations:
        words += ["--int8-activations", activations]
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
        figures = parity["int8"]
        assert figures["int8_layers"] == (0 if activations else len(LAYERS))
        assert len(figures["weight_only"]) == (len(LAYERS) if activations else 0)
        assert len(stored) == len(LAYERS) and figures["kept"] == []
        quantized = sum(node.op_type == "QuantizeLinear" for node in graph.node)
        assert quantized == figures["int8_layers"]
        assert main([*words, "--out", str(tmp_path)]) == 0  # up to date
        assert main([*words, "--out", str(tmp_path), "--int8-keep", "blocks.0.ffn.up"]) == 1
    else:
        assert not stored


def test_an_outlier_channel_fails_the_build_with_its_layer_which_can_then_be_kept(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = load_checkpoint(student)
    model = checkpoint.build_model()
    with torch.no_grad():  # x1000, and read a thousand times as weakly
        model.blocks[0].ffn[0].weight[7] *= 1000
        model.blocks[0].ffn[2].weight[:, 7] /= 1000
    bad = tmp_path / "bad"
    told = checkpoint.deployment
    save_checkpoint(
        bad, checkpoint.config, model.state_dict(), told, checkpoint.codec, checkpoint.table
    )
    words = ["--checkpoint", str(bad), "--target", "onnx", "--precision", "int8"]
    out = tmp_path / "out"
    out.mkdir()
    assert main([*words, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "blocks.0.ffn.down (input channel 7 reaches" in error
    assert not list(out.iterdir())
    assert main([*words, "--out", str(out), "--keep-layers", "blocks.0.ffn.down"]) == 0
    figures = json.loads((out / "asd_int8.onnx.json").read_text())["parity"]["int8"]
    assert "blocks.0.ffn.down" in figures["kept"]
    assert figures["simulated_pass"] <= BUDGETS["int8"].simulated


def test_a_file_of_int8_is_a_third_of_one_of_float32(tmp_path: Path) -> None:
    config = ModelConfig(dim=96, ffn_dim=384, freq_dim=16, text_dim=8, text_len=4, in_dim=4,
                         out_dim=4, num_heads=2, num_layers=4)  # fmt: skip
    torch.manual_seed(0)
    model = WanModel(config)  # of weights that float16 does not hold
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    save_checkpoint(tmp_path / "student", config, model.state_dict())
    checkpoint = load_checkpoint(tmp_path / "student")
    names = layer_names(config.num_layers)
    sizes = {}
    for precision in ("fp32", "int8"):
        scheme = Scheme(dict.fromkeys(names, 0.02)) if precision == "int8" else None
        parts = engine_parts(checkpoint, model, precision, (4, 4), LOWERINGS["onnxruntime"], scheme)
        with WeightsFile(tmp_path / f"{precision}.weights") as weights:
            for name in ("denoiser", "prompt", "time"):
                export_part(name, parts[name], 23, weights)
        sizes[precision] = (tmp_path / f"{precision}.weights").stat().st_size
    assert sizes["int8"] <= 0.3 * sizes["fp32"]
