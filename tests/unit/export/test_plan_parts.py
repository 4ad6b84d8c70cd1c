"""Added parts of plans, built without a card: streaming codecs and the UMT5 text encoder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_rt.config import ModelConfig
from asd_rt.errors import EngineError
from asd_rt.manifest import is_text_plan, read_manifest, verify
from export import text
from export.build import main
from export.bundle import carry_over
from train.checkpoint import save_checkpoint
from train.deployment import Deployment
from train.model import WanModel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install tensorrt-rtx",
)
PLAN = "asd_fp16.plan"
CONFIG = ModelConfig(dim=32, ffn_dim=24, freq_dim=4, text_dim=16, text_len=8, in_dim=16, out_dim=16,
                     num_heads=2, num_layers=1)  # fmt: skip


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 16 channels, as Wan's codec has, without codec or words of its own."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    torch.nn.init.normal_(model.head.head.weight)
    save_checkpoint(folder, CONFIG, model.state_dict(), Deployment(2, 6, 0, 5.0, (4, 6), 8, 4))
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow TAEHV of random weights: it takes a tenth of the time that Wan's VAE does."""
    from tests.parity.test_vae import taehv_weights

    file = tmp_path_factory.mktemp("taehv") / "taew2_1.pth"
    torch.save(taehv_weights(), file)
    return file


@pytest.fixture(scope="module")
def words(wide_student: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a build of a plan; the last one is its folder."""
    folder = tmp_path_factory.mktemp("plans")
    built = ["--checkpoint", str(wide_student), "--target", "tensorrt", "--gpu", "sm89,sm120"]
    return [*built, "--out", str(folder)]


def log_of(folder: Path, part: str) -> dict[str, Any]:
    manifest = read_manifest(folder / PLAN)
    return json.loads((folder / manifest.parts[part].file).read_text())


def check_codec(words: list[str], vae: Path, graphs: tuple[str, ...], states: int) -> Path:
    """Build a codec's plans; their caches are inputs and outputs, and their log lies beside them."""
    folder = Path(words[-1])
    assert main([*words, "--vae", str(vae)]) == 0
    manifest = read_manifest(folder / PLAN)
    verify(folder / PLAN, manifest)
    assert all(manifest.parts[name].file.endswith(".plan") for name in graphs)
    assert "codec_weights" not in manifest.parts, "weights belong into plans"
    held = [name for name in manifest.parts["decoder"].inputs if name.startswith("state.")]
    assert len(held) == states
    assert all(f"new_{name}" in manifest.parts["decoder"].outputs for name in held)
    assert manifest.parity["codec"]["largest"]["decoder"] < 1e-3
    log = log_of(folder, "codec_log")
    assert set(log["parts"]) == set(graphs) and log["gpus"] == ["sm89", "sm120"]
    ranges = log["parts"]["decoder"]["ranges"]
    assert ranges["F"] == [1, 2, 2] and ranges["h"] == [4, 4, 4] and ranges["4w"] == [24, 24, 24]
    assert all(part["layers"] for part in log["parts"].values())
    return folder


def test_a_streaming_codec(words: list[str], vae: Path) -> None:
    folder = check_codec(words, vae, ("decoder_first", "decoder"), states=9)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert main([*words, "--vae", str(vae)]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.long
def test_the_codec_of_wan(words: list[str], tmp_path: Path) -> None:
    """Four parts with attention and 32 caches; a minute on an idle core."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(base_dim=8).save_pretrained(tmp_path / "vae")
    graphs = ("decoder_first", "decoder", "encoder_first", "encoder")
    check_codec(words, tmp_path / "vae", graphs, states=32)


def test_a_text_encoder(words: list[str], write_umt5: Callable[..., Path], tmp_path: Path) -> None:
    """Compiled unless it is asked to stay a graph, whose weights then lie beside the plans."""
    folder, umt5 = Path(words[-1]), write_umt5(tmp_path / "umt5", d_model=16)
    assert main([*words, "--text-encoder", str(umt5)]) == 0
    manifest = read_manifest(folder / PLAN)
    verify(folder / PLAN, manifest)
    assert is_text_plan(manifest) and "text_weights" not in manifest.parts
    assert manifest.tokenizer == {"kind": "umt5", "max_tokens": 8}
    assert manifest.parity["text"]["relative_l2"] < 1e-5
    log = log_of(folder, "text_log")
    assert log["parts"]["text"]["ranges"]["L"] == [1, 8, 8] and log["parts"]["text"]["layers"]
    first = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert main([*words, "--text-encoder", str(umt5), "--text-target", "tensorrt"]) == 0
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == first

    assert main([*words, "--text-encoder", str(umt5), "--text-target", "onnx"]) == 0
    manifest = read_manifest(folder / PLAN)
    verify(folder / PLAN, manifest)
    assert manifest.parts["text"].file.endswith(".onnx") and "text_log" not in manifest.parts
    assert manifest.parts["text_weights"].bytes > 0
    assert not list(folder.glob("*text*.plan")), "the plan that nothing names is left"


def test_what_cannot_be_compiled_names_the_way_out(
    words: list[str],
    write_umt5: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, umt5 = Path(words[-1]), write_umt5(tmp_path / "umt5", d_model=16, num_layers=1)
    assert main(words) == 0
    before = sorted(folder.iterdir())

    def refuse(*_: Any) -> None:
        raise EngineError("text: tensorrt_rtx built nothing: no reason given")

    for name, thing, told in (
        ("compile_added", refuse, "built nothing"),
        ("available_memory_bytes", lambda: 100, "billion weights takes about"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(text, name, thing)
            assert main([*words, "--text-encoder", str(umt5)]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert told in error and "--text-target onnx" in error
        assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--text-target", "onnx"], "--text-target is for --text-encoder"),
        (
            ["--target", "tensorrt", "--text-encoder", "x", "--text-precision", "int8"],
            "use --text-precision fp16, or keep the text encoder a graph",
        ),
        (
            ["--target", "onnx", "--text-encoder", "x", "--text-target", "tensorrt"],
            "use --target tensorrt",
        ),
    ],
)
def test_targets_of_text(
    wide_student: Path,
    tmp_path: Path,
    more: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--checkpoint", str(wide_student), "--out", str(tmp_path), "--precision", "fp16"]
    assert main([*words, *more]) == 1
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_text_goes_with_its_cards_and_its_builder(
    words: list[str], write_umt5: Callable[..., Path], tmp_path: Path
) -> None:
    """An engine that is built anew keeps it where it serves still."""
    folder, umt5 = Path(words[-1]), write_umt5(tmp_path / "umt5", d_model=16)
    assert main([*words, "--text-encoder", str(umt5), "--force"]) == 0
    old = read_manifest(folder / PLAN)
    names = ("text", "text_log", "tokenizer")
    parts = {name: part for name, part in old.parts.items() if name not in names}
    bare = replace(old, parts=parts, sources={}, tokenizer=None)
    assert carry_over(folder / PLAN, bare).parts["text"] == old.parts["text"]
    for change in ({"gpus": ("sm86",)}, {"tools": old.tools | {old.backend: "9.9"}}):
        new = carry_over(folder / PLAN, replace(bare, **change))
        assert "text" not in new.parts and new.tokenizer is None and new.sources == {}


def test_a_plan_of_a_codec_is_for_blocks_of_one_size(words: list[str], vae: Path) -> None:
    folder = Path(words[-1])
    assert main([*words, "--vae", str(vae)]) == 0
    old = read_manifest(folder / PLAN)
    names = old.sources["codec"]["parts"]
    parts = {name: part for name, part in old.parts.items() if name not in names}
    bare = replace(old, parts=parts, sources={}, codec=None)
    assert carry_over(folder / PLAN, bare).parts["decoder"] == old.parts["decoder"]
    new = carry_over(folder / PLAN, replace(bare, cache=replace(old.cache, block_frames=3)))
    assert "decoder" not in new.parts and new.codec is None and "codec" not in new.sources
