"""Real plans, built without a card; skipped where no TensorRT builder is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from asd_rt.errors import BackendError, EngineError
from asd_rt.manifest import TensorSpec, read_manifest, verify
from export.build import main
from export.tensorrt import build_plan, check_gpus, import_tensorrt, profile_ranges

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install tensorrt-rtx",
)
GPUS = ("sm89", "sm120")


def test_plan_with_manifest(student: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(student), "--target", "tensorrt", "--precision", "fp16"]
    assert main([*words, "--gpu", ",".join(GPUS), "--out", str(tmp_path)]) == 0
    path = tmp_path / "asd_fp16.plan"
    manifest = read_manifest(path)
    verify(path, manifest)
    assert manifest.gpus == GPUS
    assert manifest.backend in ("tensorrt", "tensorrt_rtx")
    assert manifest.backend in manifest.tools
    assert manifest.parts["denoiser"].inputs["past_k.0"].dtype == "float16"
    assert manifest.parts["denoiser"].inputs["latents"].dtype == "float32"
    assert all(part.file.endswith(".plan") for part in manifest.parts.values())
    assert 0 < manifest.parity["pass"]["denoiser"] < 5e-3
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json"] + [".plan"] * 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--gpu", "sm42"), "sm42"),
        (("--precision", "fp32"), "use --precision fp16"),
        (("--window-frames", "0", "--sink-frames", "0"), "--window-frames or --max-frames"),
    ],
)
def test_wishes_that_cannot_be_met(
    student: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--checkpoint", str(student), "--target", "tensorrt", "--out", str(tmp_path), *words]
    assert main(command) == 1
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error:")]  # warnings stand before it
    assert told in error
    assert list(tmp_path.iterdir()) == []


def toy_graph(op: str, unused: bool = False) -> tuple[dict[str, TensorSpec], onnx.ModelProto]:
    names = ["x", "y"] if unused else ["x"]
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 4])
        for n in ("x", "y")[: len(names)]
    ]
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["B", 4])
    node = helper.make_node(op, ["x"], ["z"], "the_node")
    graph = helper.make_graph([node], "toy", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return dict.fromkeys(("x", "y")[: len(names)], TensorSpec("float32", ("B", 4))), model


def compile_toy(folder: Path, inputs: dict[str, TensorSpec], model: onnx.ModelProto) -> None:
    file = folder / "toy.onnx"
    onnx.save(model, file)
    build_plan(import_tensorrt(), "toy", file, inputs, {"B": (1, 1, 2)}, GPUS[:1])


def test_unsupported_node_is_named(tmp_path: Path) -> None:
    inputs, model = toy_graph("Det")
    with pytest.raises(EngineError, match="Det node the_node") as error:
        compile_toy(tmp_path, inputs, model)
    assert "\n" not in str(error.value)


def test_missing_input_is_named(tmp_path: Path) -> None:
    inputs, model = toy_graph("Relu", unused=True)
    del model.graph.input[1]
    with pytest.raises(EngineError, match=r"Unused Input.*y"):
        compile_toy(tmp_path, inputs, model)


def test_targets_are_checked() -> None:
    trt = import_tensorrt()
    assert check_gpus(trt, ["sm89", "sm89", "sm120"]) == GPUS
    with pytest.raises(BackendError, match="--gpu none"):
        check_gpus(trt, ["none"])


def test_profile_covers_every_past_length() -> None:
    ranges = profile_ranges(block=3, capacity=12, latent_hw=(8, 8))
    assert ranges["P"] == (0, 144, 144)
    assert ranges["T"] == (48, 48, 96)
