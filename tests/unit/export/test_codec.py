"""--vae: what does not belong to the checkpoint is refused before anything is built."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import pytest
import torch

from asd_rt.decoding import STATE, resolve_shape
from asd_rt.errors import EngineError
from asd_rt.manifest import TensorSpec, read_manifest
from export import codec as codec_module
from export.build import main
from export.codec import CodecChoice, codec_parts, measure_codec
from export.parity_report import report_files
from train.taehv import TaehvDecoder
from train.vae import WanDecoder, WanEncoder, WanVae
from train.vae_config import WanVaeConfig
from train.vae_weights import VideoCodec, load_codec


@pytest.fixture(scope="module")
def taehv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of TAEHV's layout, for latents of 2 channels as the student's."""
    path = tmp_path_factory.mktemp("taehv") / "taew2_1.pth"
    decoder = TaehvDecoder(2, (12, 8, 6, 6))
    torch.manual_seed(0)
    shapes = decoder.stored_shapes()
    weights = {k: torch.randn(s) / max(1, prod(s[1:])) ** 0.5 for k, s in shapes.items()}
    weights["decoder.22.weight"] *= 0.01  # so that few values are cut at 0 and 1
    weights["decoder.22.bias"].fill_(0.5)
    torch.save(weights, path)
    return path


def refused(words: list[str], out: Path, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(out))
    assert main([*words, "--target", "onnx", "--out", str(out)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and told in lines[0], lines
    assert sorted(os.listdir(out)) == before


def test_a_checkpoint_with_its_own_codec(
    student: Path, taehv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(student), "--vae", str(taehv)]
    refused(words, tmp_path, "has its own codec; leave the flag out", capsys)


def test_other_channels(
    bare_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    shapes = TaehvDecoder(16, (4, 3, 2, 2)).stored_shapes()
    path = tmp_path / "taew2_1.pth"
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, path)
    words = ["--checkpoint", str(bare_student), "--vae", str(path)]
    refused(words, tmp_path, "latents of 16 channels, but checkpoint bare makes 2", capsys)


def test_broken_files_leave_nothing(
    bare_student: Path, taehv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.pth"
    short.write_bytes(taehv.read_bytes()[:100])
    for path, told in ((short, "cut short"), (tmp_path / "none", "no such file")):
        words = ["--checkpoint", str(bare_student), "--vae", str(path)]
        refused(words, tmp_path, told, capsys)


def test_a_codec_is_added_to_an_engine(
    bare_student: Path, taehv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TAEHV with half-precision weights and caches comes in; the rest stays, also when all is built again."""
    engine = tmp_path / "asd_fp32.onnx"
    words = ["--checkpoint", str(bare_student), "--target", "onnx", "--out", str(tmp_path)]
    assert main(words) == 0
    old = read_manifest(engine)
    assert main([*words, "--vae", str(taehv), "--vae-precision", "fp16"]) == 0
    new = read_manifest(engine)
    files = {path.name for path in tmp_path.iterdir()}
    reports = {file.name for file in report_files(tmp_path / "asd_fp32.onnx")}
    assert files == {"asd_fp32.onnx.json", *reports, *(part.file for part in new.parts.values())}
    assert new.codec == {"kind": "taehv", "spatial": 8, "temporal": 4}
    assert new.sources["codec"] == {
        "name": "taew2_1.pth",
        "sha256": load_codec(taehv).sha256,
        "precision": "fp16",
        "parts": ["codec_weights", "decoder_first", "decoder"],
    }
    states = [s for n, s in new.parts["decoder"].inputs.items() if n.startswith(STATE)]
    assert len(states) == 9 and {spec.dtype for spec in states} == {"float16"}
    assert 0 < new.parity["codec"]["largest"]["decoder"] <= 5e-2
    assert {name: new.parts[name] for name in old.parts} == dict(old.parts)

    assert main([*words, "--force"]) == 0
    again = read_manifest(engine)
    assert again.codec == new.codec and again.parts["decoder"] == new.parts["decoder"]
    monkeypatch.setitem(codec_module.BUDGETS, "fp16", 1e-6)
    with pytest.raises(
        EngineError, match=r"parity with float32 torch failed.*--vae-precision fp32"
    ):
        measure_codec(tmp_path, new, CodecChoice(load_codec(taehv), "fp16"))
    monkeypatch.setitem(codec_module.BUDGETS, "fp32", 1e-9)
    with pytest.raises(EngineError, match=r"not added to asd_fp32; name another codec$"):
        measure_codec(tmp_path, new, CodecChoice(load_codec(taehv), "fp32"))


def test_the_real_vae_keeps_what_is_said_of_it() -> None:
    """32 tensors, 1.9 GB in float16 at 832x480, without a weight in memory."""
    with torch.device("meta"):
        vae = WanVae(WanVaeConfig())
        codec = VideoCodec("wan", "real", "0" * 64, 16, WanDecoder(vae), WanEncoder(vae))
        parts = codec_parts(CodecChoice(codec, "fp16"))
    for name, count, size in (("decoder", 32, 1.89e9), ("encoder", 24, 1.12e9)):
        states = [shape for key, (_, shape) in parts[name].inputs.items() if key.startswith(STATE)]
        sizes = {"h": 60, "w": 104}
        total = sum(
            2 * torch.Size(resolve_shape(TensorSpec("float16", shape), sizes)).numel()
            for shape in states
        )
        assert len(states) == count and total == pytest.approx(size, rel=0.01)
        assert not any(key.startswith(STATE) for key in parts[f"{name}_first"].inputs)
