"""What is done differently for a large network, tried on a small one that is called large."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import asd_rt
from asd_rt import planner
from asd_rt.backends.openvino import import_openvino
from asd_rt.backends.openvino_weights import keep_weights_half
from asd_rt.manifest import Manifest, read_manifest, verify
from asd_rt.plan import FixedPlan
from export.build import main
from export.denoiser import DenoiserPart, JoinedPart
from export.lowering import LOWERINGS
from export.parts import engine_parts
from train.checkpoint import load_checkpoint

PRECISIONS = ("bf16", "fp32")


@pytest.fixture(scope="module")
def large_engines(student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of `student` by precision, built as those of a large network are."""
    folder = tmp_path_factory.mktemp("large")
    words = ["--checkpoint", str(student), "--target", "onnx", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "LARGE_PARAMETERS", 1)
        for precision in PRECISIONS:
            assert main([*words, "--precision", precision]) == 0
    return {precision: folder / f"asd_{precision}.onnx" for precision in PRECISIONS}


@pytest.fixture
def called_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The runtime too calls it large; returns where it may keep things."""
    monkeypatch.setattr(planner, "LARGE_PARAMETERS", 1)
    monkeypatch.setenv("ASD_RT_CACHE", str(tmp_path))
    return tmp_path


def play(path: Path, manifest: Manifest) -> np.ndarray:
    draw = np.random.default_rng(0)
    model, (rows, columns) = manifest.model, manifest.latent_hw or (4, 2)
    shape = (1, 5 * manifest.cache.block_frames, model.in_dim, rows, columns)
    noise = draw.standard_normal(shape).astype(np.float32)
    context = draw.standard_normal((1, model.text_len, model.text_dim)).astype(np.float32)
    with asd_rt.open(path) as session:
        return session.replay(noise, context, plan=FixedPlan(1, 2)).latents


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_built_is_open_in_size_and_not_joined(
    large_engines: dict[str, Path], precision: str
) -> None:
    manifest = read_manifest(large_engines[precision])
    verify(large_engines[precision], manifest)
    assert "joined" not in manifest.parts
    assert manifest.latent_hw == (4, 2)
    assert manifest.parts["denoiser"].inputs["latents"].shape[-2:] == ("h", "w")
    assert manifest.parity["reduced"] == {"latents": [[4, 6]], "rollout_frames": 4}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_plays_as_the_small_way_does(
    large_engines: dict[str, Path],
    precision: str,
    called_large: Path,
    student: Path,
    built: Path,
) -> None:
    path = large_engines[precision]
    manifest = read_manifest(path)
    found = play(path, manifest)
    assert not (called_large / "openvino").exists()  # gigabytes are not kept twice on disk
    expected = play(built / "asd_fp32.onnx", read_manifest(built / "asd_fp32.onnx"))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < {"bf16": 5e-2, "fp32": 1e-5}[precision]


@pytest.mark.usefixtures("called_large")
def test_a_prompt_is_read_and_its_weights_are_let_go(large_engines: dict[str, Path]) -> None:
    with asd_rt.open(large_engines["fp32"]) as session:
        list(session.generate("red", frames=2))
        held = {part for part, _ in session.engine._sessions}
    assert "denoiser" in held
    assert "prompt" not in held


def test_all_products_of_a_pass_read_their_weights_as_stored(
    large_engines: dict[str, Path],
) -> None:
    openvino = import_openvino()
    model = openvino.Core().read_model(str(large_engines["bf16"]))
    layers = read_manifest(large_engines["bf16"]).model.num_layers
    # Of matrices of fewer than 1024 elements, the weights are not halved.
    assert keep_weights_half(openvino, model) >= 4 * layers
    assert keep_weights_half(openvino, model) == 0


def test_the_joined_part_has_no_weights_of_its_own(student: Path) -> None:
    checkpoint = load_checkpoint(student)
    parts = engine_parts(
        checkpoint, checkpoint.build_model(), "fp16", None, LOWERINGS["onnxruntime"]
    )
    denoiser, joined = parts["denoiser"].module, parts["joined"].module
    assert isinstance(denoiser, DenoiserPart)
    assert isinstance(joined, JoinedPart)
    own = {name: p.data_ptr() for name, p in denoiser.named_parameters()}
    assert own == {name: p.data_ptr() for name, p in joined.named_parameters()}


EXPORT = """
import re, sys
from pathlib import Path
import torch
from asd_rt.config import ModelConfig
from export.onnx import export_part
from export.lowering import LOWERINGS
from export.parts import engine_parts
from export.weights import WeightsFile
from train.checkpoint import Checkpoint
from train.deployment import Deployment
from train.model import WanModel

def peak():
    # Of this program alone: ru_maxrss begins with what the process that started it had.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def export(dim, layers):
    config = ModelConfig(dim=dim, ffn_dim=4 * dim, freq_dim=8, text_dim=8, text_len=4, in_dim=4, out_dim=4,
                         num_heads=dim // 64, num_layers=layers)
    weights = WanModel(config).state_dict()
    checkpoint = Checkpoint("medium", "0" * 64, config, weights, Deployment(), None, None)
    size = sum(t.nbytes for t in weights.values())
    before = peak()
    lowering = LOWERINGS["onnxruntime"]
    parts = engine_parts(checkpoint, checkpoint.build_model(), "fp32", None, lowering)
    with WeightsFile(Path(sys.argv[1])) as file:
        for name in list(parts):
            export_part(name, parts.pop(name), lowering.opset, file)
    return size, peak() - before

export(64, 1)  # whatever the exporter keeps for itself
print(*export(1536, 2))
"""


@pytest.mark.long
def test_export_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path / "weights")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    size, growth = map(int, done.stdout.split())
    assert size > 250e6
    # Queries, keys and values side by side are a copy; the rest is seen where it lies.
    assert growth < 0.7 * size
