"""The parity report: layers, frames, the command, and engines that miss their budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

import asd_rt
from asd_rt.backends.ort import open_engine
from asd_rt.cli import main as asd_rt_main
from asd_rt.errors import EngineError
from asd_rt.frame_loop import Request
from asd_rt.manifest import read_manifest, sha256_file, write_manifest
from asd_rt.plan import FixedPlan
from export import parity
from export.build import main as build
from export.drift import Drift, build_blocks, longest, measure_drift, play
from export.layer_errors import LayerError, find_taps, measure_layers, rescaled, worst_layer
from export.parity_command import main
from export.quantize import LAYERS
from export.reference import TorchEngine
from export.rounding import round_results
from export.speed import measure_speed, replaced_engine
from train.checkpoint import Checkpoint, load_checkpoint

Spoil = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def checkpoint(student: Path) -> Checkpoint:
    return load_checkpoint(student)


@pytest.fixture
def engine(built: Path) -> Path:
    return built / "asd_fp32.onnx"


@pytest.fixture
def spoiled(student: Path, tmp_path: Path) -> Callable[[Spoil], Path]:
    """Copies the student, with weights changed."""

    def copy(change: Spoil) -> Path:
        folder = tmp_path / "spoiled"
        shutil.copytree(student, folder)
        weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
        change(weights)
        save_file(weights, folder / "model.safetensors")
        return folder

    return copy


def test_every_build_leaves_a_report(engine: Path) -> None:
    told = read_manifest(engine).parity
    (entry,) = json.loads(Path(f"{engine}.parity.json").read_text())["engines"]
    assert entry["parity"]["pass"] == told["pass"]
    drift = entry["drift"]
    assert told["drift"].items() <= drift.items()
    assert drift["blocks"] == build_blocks(read_manifest(engine)) == 24
    assert len(drift["frames"]) == len(drift["frames_fed"]) == 24 * 2
    assert 0 < max(drift["frames"]) < 1e-4
    assert f"| {engine.name} |" in Path(f"{engine}.parity.md").read_text()
    assert "inaccurate" not in told and "speed" not in told


def test_layers_of_a_good_engine_are_all_named_and_good(
    engine: Path, checkpoint: Checkpoint
) -> None:
    layers = measure_layers(engine, read_manifest(engine), checkpoint, checkpoint.build_model())
    products = [f"blocks.0.{name}" for name in LAYERS]
    assert [layer.name for layer in layers] == [*products, "blocks.0.output", "head"]
    assert all(0 < layer.error < 1e-5 for layer in layers)
    assert [layer.name for layer in layers if layer.own is None] == ["blocks.0.output"]
    assert max(layer.own or 0 for layer in layers) < 1e-5


@pytest.mark.parametrize("name", ["self_attn.k", "cross_attn.o", "ffn.0"])
def test_the_layer_to_blame_is_named(engine: Path, checkpoint: Checkpoint, name: str) -> None:
    model = checkpoint.build_model()
    with torch.no_grad():
        model.blocks[0].get_submodule(name).weight.mul_(1.05)
    layers = measure_layers(engine, read_manifest(engine), checkpoint, model)
    blamed = next(layer for layer, sources in LAYERS.items() if name in sources)
    assert worst_layer(layers).startswith(f"most arises in blocks.0.{blamed} ")
    own = {layer.name: layer.own for layer in layers if layer.own is not None}
    assert own.pop(f"blocks.0.{blamed}") > 1e-2
    assert max(own.values()) < 1e-5  # errors that come from before are not theirs


def test_the_first_layer_that_is_not_finite_is_the_one_to_blame() -> None:
    inf, fine = float("inf"), LayerError("a", 1e-3, 1e-3)
    layers = [fine, LayerError("b", inf, inf), LayerError("c", inf, None)]
    assert worst_layer(layers) == "b is the first that is not finite"
    assert worst_layer([fine, layers[2]]) == "what goes into c is the first that is not finite"
    assert layers[1].to_json() == {"name": "b", "error": None, "own": None}


def test_scales_of_channels_are_found() -> None:
    draw = np.random.default_rng(0)
    expected = draw.standard_normal((48, 20)).astype(np.float32)
    scales = draw.uniform(0.1, 10, 20).astype(np.float32)
    np.testing.assert_allclose(rescaled(expected * scales, expected), expected, rtol=1e-5)
    assert np.isfinite(rescaled(np.zeros_like(expected), expected)).all()


def test_a_layer_whose_input_is_scaled_is_judged_without_the_scale(
    engine: Path, checkpoint: Checkpoint
) -> None:
    """As smoothing does it: here torch has the scale, in norm3, and the engine has not."""
    model, scales = checkpoint.build_model(), torch.linspace(0.2, 5, 32)
    with torch.no_grad():
        model.blocks[0].norm3.weight.mul_(scales)
        model.blocks[0].norm3.bias.mul_(scales)
        model.blocks[0].cross_attn.q.weight.div_(scales)
    layers = measure_layers(engine, read_manifest(engine), checkpoint, model)
    assert max(layer.own or 0 for layer in layers) < 1e-5


def test_a_graph_without_our_names_is_refused() -> None:
    with pytest.raises(asd_rt.EngineError, match=r"weight blocks\.0\.self_attn\.qkv\.weight"):
        find_taps(onnx.GraphProto(name="other"))


def test_fed_latents_go_into_the_cache(engine: Path) -> None:
    """As if they had been given as the video's first blocks."""
    opened = open_engine(engine, read_manifest(engine), 1)
    draw = np.random.default_rng(3)
    context, given = (
        draw.standard_normal(shape).astype(np.float32) for shape in ((1, 4, 3), (1, 4, 2, 4, 2))
    )
    request = Request(context, (1, 6, 2, 4, 2), FixedPlan(1, 1), seed=5)
    for number, block in enumerate(play(opened, request)):
        latents = block.latents.copy()
        if number < 2:
            block.latents[:] = given[:, 2 * number : 2 * number + 2]
    (last,) = play(opened, replace(request, initial=given))
    np.testing.assert_array_equal(last.latents, latents)
    opened.close()


def test_drift_sees_other_weights(engine: Path, checkpoint: Checkpoint) -> None:
    manifest, model = read_manifest(engine), checkpoint.build_model()
    opened = open_engine(engine, manifest, 1)

    def measured(blocks: int) -> Drift:
        return measure_drift(opened, TorchEngine(checkpoint, manifest, model), checkpoint, blocks)[
            0
        ]

    good = measured(8)
    assert good.early is not None and max(good.free + good.fed) < 1e-4
    size = good.block_frames
    assert good.free[:size] == good.fed[:size]  # before anything came back through the cache
    with torch.no_grad():
        model.head.head.bias.add_(0.1)
    spoiled = measured(2)
    assert spoiled.early is None and min(spoiled.free) > 1e-3
    opened.close()


def test_rollouts_end_where_the_cache_does(engine: Path) -> None:
    manifest = read_manifest(engine)
    assert longest(manifest, 200) == 200
    short = replace(manifest.cache, window_frames=0, sink_frames=0, max_frames=9)
    assert longest(replace(manifest, cache=short), 200) == 4


def test_fp16_that_overflows_is_refused_with_the_layers_name(
    spoiled: Callable[[Spoil], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def overflow(weights: dict[str, torch.Tensor]) -> None:
        weights["blocks.0.self_attn.v.weight"] *= 1e6
        weights["blocks.0.self_attn.o.weight"] *= 1e-6

    folder, out = spoiled(overflow), tmp_path / "out"
    out.mkdir()
    words = ["--checkpoint", str(folder), "--target", "onnx", "--out", str(out)]
    assert build([*words, "--precision", "fp16", "--allow-inaccurate"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "blocks.0.self_attn.v reaches" in error
    assert list(out.iterdir()) == []


def test_an_inaccurate_engine_says_so_everywhere(
    spoiled: Callable[[Spoil], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cancel(weights: dict[str, torch.Tensor]) -> None:
        """Values far from zero that the next layer takes away again: float16 loses what lies between."""
        weights["blocks.0.self_attn.v.bias"] += 1000
        far = torch.full((32,), 1000.0)
        weights["blocks.0.self_attn.o.bias"] -= weights["blocks.0.self_attn.o.weight"] @ far

    words = ["--checkpoint", str(spoiled(cancel)), "--target", "onnx", "--precision", "fp16"]
    (tmp_path / "engines").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "asd_rt.cli.logging.basicConfig", lambda **_: None
    )  # of all other tests too
    assert build([*words, "--allow-inaccurate"]) == 0
    path = Path("engines/asd_fp16.onnx")
    missed = read_manifest(path).parity["inaccurate"]
    assert any(line.startswith("denoiser ") for line in missed)
    assert missed[-1].startswith("most arises in blocks.0.self_attn.o ")
    assert "misses its budget" in Path(f"{path}.parity.md").read_text()
    (entry,) = json.loads(Path(f"{path}.parity.json").read_text())["engines"]
    assert [layer["name"] for layer in entry["layers"]][-1] == "head"

    capsys.readouterr()
    assert build(words) == 1
    error = capsys.readouterr().err
    assert "was built with --allow-inaccurate" in error and "--force" in error
    assert build([*words, "--allow-inaccurate"]) == 0

    caplog.clear()
    with asd_rt.open(path):
        assert caplog.text.count("INACCURATE") == 1
    capsys.readouterr()
    for command in (["inspect", str(path)], ["doctor"]):
        asd_rt_main(command)
        assert capsys.readouterr().out.count("INACCURATE") == 1


def test_an_accurate_engine_passes_without_a_word(
    engine: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    gate = parity.measure(engine, read_manifest(engine), checkpoint, checkpoint.build_model(), 0)
    parity.accept("asd_fp32", gate, False, "fp32")
    assert gate.drift is None and gate.layers == () and gate.finite
    with asd_rt.open(engine):
        assert not caplog.text


@pytest.mark.parametrize(
    ("precision", "is_plan", "advice"),
    [
        ("fp16", False, "build with --precision fp32, or look"),
        ("fp32", False, "nothing was written; look"),
        ("int8", True, "build with --precision fp16 or bf16, or look"),
        ("fp16", True, "build with --precision bf16, or look"),
    ],
)
def test_advice_of_the_gate_can_be_taken(precision: str, is_plan: bool, advice: str) -> None:
    """Never the precision that failed, and never fp32 for a plan, which takes none."""
    gate = parity.Gate({"inaccurate": ["denoiser 1.0 > 0.1"]}, None, (), 1.0, 1.0)
    with pytest.raises(EngineError, match=f"{advice} for weights that overflow"):
        parity.accept("asd", gate, False, precision, is_plan)


def test_the_command_measures_several_engines(
    engine: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(engine.parent, other)
    words = ["--checkpoint", str(student), "--blocks", "3", "--out", str(tmp_path), "--layers"]
    assert main(["--engine", str(engine), str(other / engine.name), *words]) == 0
    names = ["parity.json", "parity.md", "parity-frames.png", "parity-layers.png"]
    assert json.loads(capsys.readouterr().out)["files"] == [str(tmp_path / n) for n in names]
    entries = json.loads((tmp_path / "parity.json").read_text())["engines"]
    assert entries[0] == entries[1]
    assert entries[0]["drift"]["blocks"] == 3
    assert len(entries[0]["layers"]) == 8
    assert entries[0]["semantics"] is None  # no student of the tiny world
    for name in names[2:]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "parity.md").read_text().count("## asd_fp32.onnx") == 2
    assert not list(tmp_path.glob(".*"))


def test_a_plan_without_its_card_is_told_of_as_it_was_built(
    engine: Path,
    student: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if asd_rt.engines.has_nvidia_driver():
        pytest.skip("there is a card")
    plan, old = tmp_path / "asd_fp16.plan", read_manifest(engine)
    plan.write_bytes(b"of another machine")
    part = replace(
        old.parts["denoiser"], file=plan.name, sha256=sha256_file(plan), bytes=plan.stat().st_size
    )
    for name in ("time", "prompt"):
        shutil.copy(engine.parent / old.parts[name].file, tmp_path)
    parts = {name: old.parts[name] for name in ("time", "prompt")} | {"denoiser": part}
    changes = {"backend": "tensorrt_rtx", "runtime": "tensorrt", "gpus": ("sm89",), "codec": None}
    write_manifest(plan, replace(old, parts=parts, **changes))
    assert main(["--engine", str(plan), "--checkpoint", str(student)]) == 0
    assert caplog.text.count("cannot run here") == 1
    assert "| asd_fp16.plan |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--checkpoint", "{student}", "--blocks", "-1"], "--blocks must be 0 or more"),
        (["--checkpoint", "{student}", "--out", "{engine}"], "cannot be made"),
        (["--checkpoint", "{bare}"], "was built from checkpoint student"),
        ([], "name it with --checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    engine: Path,
    student: Path,
    bare_student: Path,
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [word.format(student=student, bare=bare_student, engine=engine) for word in words]
    assert main(["--engine", str(engine), *filled]) == 1
    output = capsys.readouterr()
    assert told in output.err
    assert output.err.count("\n") == 1 and not output.out


def test_an_engine_is_compared_with_the_float_engine_it_would_replace(
    engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    manifest = read_manifest(engine)
    assert replaced_engine(engine.parent, manifest) is None  # nothing is better than fp32
    halved = replace(manifest, precision="fp16")
    assert replaced_engine(engine.parent, halved) == (engine, manifest)
    other = replace(halved, checkpoint={**halved.checkpoint, "sha256": "0" * 64})
    assert replaced_engine(engine.parent, other) is None
    assert measure_speed(engine, manifest, engine.parent) is None
    found = measure_speed(engine, halved, engine.parent)
    assert found is not None and found["against"] == engine.name
    ratio = found["ms_a_pass"] / found["its_ms_a_pass"]
    assert found["times_as_long"] == pytest.approx(ratio, abs=2e-2)
    assert caplog.text.count("times as long as asd_fp32.onnx here") == 1
    assert ("it is not faster" in caplog.text) == (found["times_as_long"] >= 1)


def test_float16_is_rounded_after_every_operator() -> None:
    """Unlike by ONNX Runtime on a CPU, which keeps what overflows where the next operator shrinks it."""
    half, helper = onnx.TensorProto.FLOAT16, onnx.helper
    scales = {"up": np.float16(60000), "down": np.float16(1e-4)}
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "up"], ["y"]),
            helper.make_node("Mul", ["y", "down"], ["z"]),
        ],
        "denoiser",
        [helper.make_tensor_value_info("x", half, [2])],
        [helper.make_tensor_value_info("z", half, [2])],
        [onnx.numpy_helper.from_array(value, name) for name, value in scales.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    round_results(model, half)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(["z"], {"x": np.array([1.0009765625, 4], np.float16)})
    with np.errstate(over="ignore"):
        expected = np.array([1.0009765625, 4], np.float16) * scales["up"] * scales["down"]
    np.testing.assert_array_equal(found, expected)
    assert found[1] == np.inf
