"""Real plans, built without a card; skipped where no TensorRT builder is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from asd_rt.config import ModelConfig
from asd_rt.errors import BackendError, EngineError
from asd_rt.manifest import Manifest, TensorSpec, read_manifest, verify
from export.build import main
from export.lowering import LOWERINGS
from export.onnx import export_part, serialize, tensor_specs
from export.parity_report import report_files
from export.parts import engine_parts
from export.quantize import LAYERS, Scheme
from export.tensorrt import Plan, build_plan, check_gpus, import_tensorrt, profile_ranges
from export.weights import WeightsFile
from train.model import WanModel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install tensorrt-rtx",
)
GPUS = ("sm89", "sm120")


def build(
    student: Path, folder: Path, precision: str, *more: str
) -> tuple[Manifest, dict[str, Any]]:
    """A plan of the student; its manifest and the log of its builder."""
    words = ["--checkpoint", str(student), "--target", "tensorrt", "--precision", precision]
    assert main([*words, "--gpu", ",".join(GPUS), "--out", str(folder), *more]) == 0
    path = folder / f"asd_{precision}.plan"
    manifest = read_manifest(path)
    verify(path, manifest)
    assert manifest.gpus == GPUS
    assert manifest.backend in ("tensorrt", "tensorrt_rtx")
    assert manifest.backend in manifest.tools
    assert manifest.parts["denoiser"].inputs["latents"].dtype == "float32"
    log = manifest.parts["build_log"].file
    plans = [part.file for name, part in manifest.parts.items() if name != "build_log"]
    assert all(file.endswith(".plan") for file in plans) and len(plans) == 7
    reports = [file.name for file in report_files(path)]
    files = [*plans, log, f"{path.name}.json", *reports]
    assert sorted(files) == sorted(p.name for p in folder.iterdir())
    return manifest, json.loads((folder / log).read_text())


def test_plan_with_manifest(student: Path, tmp_path: Path) -> None:
    manifest, log = build(student, tmp_path, "fp16")
    assert manifest.parts["denoiser"].inputs["past_k.0"].dtype == "float16"
    assert 0 < manifest.parity["pass"]["denoiser"] < 5e-3
    assert log["gpus"] == list(GPUS) and log["version"] == manifest.tools[log["builder"]]
    part = log["parts"]["denoiser"]
    assert part["ranges"]["P"] == [0, 8, 8] and part["bytes"] == manifest.parts["denoiser"].bytes
    assert part["fused_attentions"] == 2 and part["eight_bit_products"] == 0
    assert any(n.startswith("blocks.0.up/") for y in part["layers"] for n in y["origin"])
    others = {"time", "prompt", "step", "text", "decoder", "encoder"}
    assert set(log["parts"]) == {"denoiser", *others}


def test_int8_plan(student: Path, tmp_path: Path) -> None:
    """Every layer that the scheme gives to int8 is a product of int8 in the plan."""
    manifest, log = build(student, tmp_path, "int8")
    assert manifest.runtime == "tensorrt"
    assert manifest.parts["denoiser"].inputs["past_k.0"].dtype == "float16"
    assert "CPUExecutionProvider" in manifest.parity["measured_with"]
    int8_layers = manifest.parity["int8"]["int8_layers"]
    part = log["parts"]["denoiser"]
    assert part["eight_bit_products"] == int8_layers > 0 and part["fused_attentions"] == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--gpu", "sm42"), "sm42"),
        (("--precision", "fp8", "--gpu", "sm86,sm89"), "sm86 cannot compute in fp8"),
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


def test_bf16_plan(student: Path, tmp_path: Path) -> None:
    manifest, log = build(student, tmp_path, "bf16")
    assert manifest.parts["denoiser"].inputs["past_k.0"].dtype == "bfloat16"
    assert "rounded to bfloat16" in manifest.parity["measured_with"]
    # Eight bits of mantissa: were nothing rounded, this would be as good as float32.
    assert 5e-4 < manifest.parity["pass"]["denoiser"] < 3e-2
    assert manifest.parity["pass"]["time"] < 1e-5  # float32 in every engine
    assert log["parts"]["denoiser"]["fused_attentions"] == 2


def test_fp8_plan(student: Path, tmp_path: Path) -> None:
    manifest, log = build(student, tmp_path, "fp8", "--keep-layers", "blocks.0.ffn.up")
    assert manifest.parity["fp8"]["kept"][:1] == ["blocks.0.ffn.up"]
    assert manifest.parity["fp8"]["asked"]["keep"] == ["blocks.0.ffn.up"]
    assert 0 < manifest.parity["pass"]["denoiser"] < 1e-1
    assert "fp8_layers" in manifest.parity["fp8"]
    part = log["parts"]["denoiser"]
    assert part["eight_bit_products"] == manifest.parity["fp8"]["fp8_layers"] > 0
    assert any("FP8" in layer["precision"]["constants"] for layer in part["layers"])


WAN_TWO_BLOCKS = ModelConfig(
    dim=1536, ffn_dim=8960, freq_dim=256, text_dim=4096, text_len=512, in_dim=16, out_dim=16,
    num_heads=12, num_layers=2,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_two_blocks_of_the_real_shape(precision: str, tmp_path: Path) -> None:
    """Random weights: what the builder makes of a layer depends on its shape alone."""
    with torch.device("meta"):
        model = WanModel(WAN_TWO_BLOCKS)
    model = model.to_empty(device="cpu").eval()
    for weight in model.state_dict().values():
        weight.fill_(0.01)
    names = [f"blocks.{i}.{name}" for i in range(2) for name in LAYERS]
    scheme = Scheme(dict.fromkeys(names, 0.05)) if precision == "int8" else None
    bare, hw = cast(Any, SimpleNamespace(table=None, codec=None)), (4, 6)
    part = engine_parts(bare, model, precision, hw, LOWERINGS["tensorrt"], scheme)["denoiser"]
    file = tmp_path / "denoiser.onnx"
    with WeightsFile(tmp_path / "denoiser.weights") as weights:
        graph = export_part("denoiser", part, LOWERINGS["tensorrt"].opset, weights, origins=True)
    file.write_bytes(serialize(graph))
    ranges = profile_ranges(3, 6, hw)
    plan = build_plan(import_tensorrt(), "denoiser", file, tensor_specs(part.inputs), ranges, GPUS)
    expected = {"fused_attentions": 4, "eight_bit_products": 12 if precision == "int8" else 0}
    assert plan.proved == expected
    stored = sum(p.numel() for p in model.blocks.parameters())
    assert len(plan.content) < stored * (1.2 if precision == "int8" else 2.2)


def compile_toy(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, TensorSpec],
    weights: dict[str, np.ndarray] | None = None,
    unread: tuple[str, ...] = (),
) -> Plan:
    """Build a plan of a graph that makes `z` like its first input; the graph lacks the inputs `unread`."""
    kinds = {
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
        "int64": TensorProto.INT64,
    }
    values = [
        helper.make_tensor_value_info(name, kinds[spec.dtype], spec.shape)
        for name, spec in inputs.items()
    ]
    made = helper.make_tensor_value_info(
        "z", values[0].type.tensor_type.elem_type, inputs["x"].shape
    )
    given = [value for value in values if value.name not in unread]
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "toy", given, [made], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    file = folder / "toy.onnx"
    onnx.save(model, file)
    return build_plan(import_tensorrt(), "toy", file, inputs, {"B": (1, 1, 2)}, GPUS[:1])


X = {"x": TensorSpec("float32", ("B", 4))}
LAYER = "blocks.3.self_attn"


def test_unsupported_node_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Det", ["x"], ["z"], f"{LAYER}/det")
    with pytest.raises(EngineError, match=f"Det node {LAYER}/det") as error:
        compile_toy(tmp_path, [node], X)
    assert "\n" not in str(error.value)


def test_an_operator_of_another_domain_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Blur", ["x"], ["z"], f"{LAYER}/blur", domain="of.mine")
    with pytest.raises(EngineError, match=f"{LAYER}/blur") as error:
        compile_toy(tmp_path, [node], X)
    assert "\n" not in str(error.value)


def test_missing_input_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["z"], "relu")
    with pytest.raises(EngineError, match=r"Unused Input.*y"):
        compile_toy(tmp_path, [node], X | {"y": X["x"]}, unread=("y",))


def attention(channels: int) -> tuple[list[onnx.NodeProto], dict[str, TensorSpec]]:
    names = ["x", "k", "v"]
    node = helper.make_node(
        "Attention", names, ["z"], f"{LAYER}/attention", q_num_heads=2, kv_num_heads=2
    )
    return [node], dict.fromkeys(names, TensorSpec("float16", (1, 48, 2 * channels)))


def test_fused_attention(tmp_path: Path) -> None:
    assert compile_toy(tmp_path, *attention(64)).proved["fused_attentions"] == 1


def test_attention_that_is_not_fused_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=f"only 0 of 1 attentions were fused, not {LAYER}/attention"
    ):
        compile_toy(tmp_path, *attention(320))


def test_an_input_that_the_parser_leaves_unused_is_named(tmp_path: Path) -> None:
    """It drops the number of valid keys, without an error."""
    (node,), inputs = attention(64)
    node.input.extend(["", "", "", "valid"])
    with pytest.raises(EngineError, match=rf"Unused Input valid \(read by {LAYER}/attention\)"):
        compile_toy(tmp_path, [node], inputs | {"valid": TensorSpec("int64", (1,))})


def quantized_product(axis: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """int8 x times int8 w, whose scales are those of `axis`."""
    make = helper.make_node
    nodes = [
        make("QuantizeLinear", ["x", "scale", "zero"], ["q"], "q"),
        make("DequantizeLinear", ["q", "scale", "zero"], ["y"], "dq"),
        make("DequantizeLinear", ["w", "scales"], ["wide"], "dqw", axis=axis),
        make("MatMul", ["y", "wide"], ["z"], f"{LAYER}.o/product"),
    ]
    weights = {
        "w": np.ones((64, 64), np.int8),
        "scales": np.full(64, 0.01, np.float16),
        "scale": np.array(0.05, np.float16),
        "zero": np.array(0, np.int8),
    }
    return nodes, weights


def test_int8_product(tmp_path: Path) -> None:
    nodes, weights = quantized_product(axis=1)
    inputs = {"x": TensorSpec("float16", ("B", 64))}
    assert compile_toy(tmp_path, nodes, inputs, weights).proved["eight_bit_products"] == 1


def test_a_product_that_is_not_int8_is_named(tmp_path: Path) -> None:
    """With scales along the summed axis, TensorRT widens the factors first."""
    nodes, weights = quantized_product(axis=0)
    inputs = {"x": TensorSpec("float16", ("B", 64))}
    told = f"only 0 of 1 8-bit products compute in 8 bits, not {LAYER}.o/product"
    with pytest.raises(EngineError, match=told):
        compile_toy(tmp_path, nodes, inputs, weights)


def test_a_builder_that_returns_nothing_says_why(tmp_path: Path) -> None:
    """Turing has no float32 products."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"], f"{LAYER}/product")]
    weights = {"w": np.ones((4, 4), np.float32)}
    inputs = {"x": TensorSpec("float32", ("B", 4))}
    file = tmp_path / "toy.onnx"
    compile_toy(tmp_path, nodes, inputs, weights)
    with pytest.raises(EngineError, match=f"built nothing: .*{LAYER}/product.*Turing") as error:
        build_plan(import_tensorrt(), "toy", file, inputs, {"B": (1, 1, 2)}, ("sm75",))
    assert "\n" not in str(error.value)


def test_targets_are_checked() -> None:
    trt = import_tensorrt()
    assert check_gpus(trt, ["sm89", "sm89", "sm120"]) == GPUS
    with pytest.raises(BackendError, match="--gpu none"):
        check_gpus(trt, ["none"])


def test_profile_covers_every_past_length() -> None:
    ranges = profile_ranges(block=3, capacity=12, latent_hw=(8, 8))
    assert ranges["P"] == (0, 144, 144)
    assert ranges["T"] == (48, 48, 96)
