"""Video codecs from files: what fits loads, all that does not is one line that says what to do."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from asd_rt.errors import AsdError
from train.taehv import TaehvDecoder
from train.vae import WanVae
from train.vae_config import WanVaeConfig
from train.vae_weights import load_codec

CONFIG = {"_class_name": "AutoencoderKLWan", "base_dim": 2, "z_dim": 16, "dropout": 0.0}
OFFICIAL = "Wan2.1_VAE.pth"


def scaled(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Random numbers that keep what they are multiplied with at its size."""
    return torch.randn(shape, generator=draw) / max(1, prod(shape[1:])) ** 0.5


def official(base: int = 2) -> dict[str, Tensor]:
    """Random weights under official names."""
    draw = torch.Generator().manual_seed(0)
    shapes = WanVae(WanVaeConfig(base_dim=base)).stored_shapes()
    return {name: scaled(shape, draw) for name, shape in shapes.items()}


def tiny() -> dict[str, Tensor]:
    """Random weights of TAEHV's layout."""
    draw = torch.Generator().manual_seed(0)
    shapes = TaehvDecoder(16, (4, 3, 2, 2)).stored_shapes()
    return {name: scaled(shape, draw) for name, shape in shapes.items()}


def write(path: Path, tensors: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", [OFFICIAL, "wan_2.1_vae.safetensors"])
def test_official_names(tmp_path: Path, name: str) -> None:
    stored = official()
    codec = load_codec(write(tmp_path / name, stored))
    assert (codec.kind, codec.channels, codec.spatial, codec.temporal) == ("wan", 16, 8, 4)
    weight = stored["decoder.upsamples.3.time_conv.weight"]
    taps = [codec.decoder.state_dict()[f"decoder.upsamples.3.time_conv.taps.{i}"] for i in range(3)]
    assert torch.equal(torch.stack(taps, dim=2), weight)
    assert codec.encoder is not None


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
def test_taehv(tmp_path: Path, name: str) -> None:
    stored = tiny() | {"encoder.0.weight": torch.zeros(2, 3, 3, 3)}
    codec = load_codec(write(tmp_path / name, stored))
    assert (codec.kind, codec.channels, codec.encoder) == ("taehv", 16, None)
    state = codec.decoder.state_dict()
    assert all(torch.equal(state[f"layers.{k[8:]}"], v) for k, v in tiny().items())


def test_another_file_is_another_codec(tmp_path: Path) -> None:
    first = load_codec(write(tmp_path / OFFICIAL, official())).sha256
    assert load_codec(tmp_path / OFFICIAL).sha256 == first
    changed = official() | {"conv2.bias": torch.ones(16)}
    assert load_codec(write(tmp_path / OFFICIAL, changed)).sha256 != first


@pytest.mark.parametrize("first", [True, False])
def test_one_step_takes_several_frames(tmp_path: Path, first: bool) -> None:
    """Steps of any size are the same; what a step keeps has the shape of what it was given."""
    codec = load_codec(
        write(tmp_path / "t.pth", tiny()) if first else write(tmp_path / OFFICIAL, official())
    )
    x = torch.randn(5, 16, 2, 4, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y, held = codec.decoder(x[:1], None)
        whole, end = codec.decoder(x[1:], held)
        parts, caches = [], held
        for i in range(1, 5):
            made, caches = codec.decoder(x[i : i + 1], caches)
            parts.append(made)
    assert len(y) == 1 and len(whole) == 16
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    for one, other in zip(caches, end, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert [c.shape for c in held] == [c.shape for c in end]


def in_folder(path: Path, config: dict[str, Any] | None, tensors: dict[str, Tensor]) -> Path:
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    write(path / "diffusion_pytorch_model.safetensors", tensors)
    return path


def cut_short(path: Path) -> Path:
    file = write(path / OFFICIAL, official())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def with_code(path: Path) -> Path:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (path / "was_run",)

    return write(path / OFFICIAL, {"conv1.weight": Runs()})


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k not in names}


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda p: p / "none", "no such file or folder"),
    "an empty folder": (lambda p: p, "holds no video codec"),
    "a folder without config.json": (lambda p: in_folder(p, None, {}), "config.json missing"),
    "another model": (
        lambda p: in_folder(p, {"_class_name": "AutoencoderKL"}, {}),
        "is a AutoencoderKL, expected AutoencoderKLWan",
    ),
    "Wan2.2's": (
        lambda p: in_folder(p, CONFIG | {"is_residual": True, "patch_size": 2}, {}),
        r"is_residual True \(expected False\), patch_size 2",
    ),
    "an unknown key": (
        lambda p: in_folder(p, CONFIG | {"depth": 3}, {}),
        "unknown key depth",
    ),
    "wrong means": (
        lambda p: in_folder(p, CONFIG | {"latents_mean": [0.0]}, {}),
        "need 16 entries",
    ),
    "a config that is no list": (
        lambda p: in_folder(p, CONFIG | {"dim_mult": 3}, {}),
        "dim_mult must be a list",
    ),
    "diffusers' without a tensor": (
        lambda p: in_folder(p, CONFIG, {"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3, 3)}),
        r"193 tensors do not fit \(194 expected\).*and 153 more",
    ),
    "missing": (
        lambda p: write(p / OFFICIAL, without(official(), "decoder.head.2.bias", "conv1.weight")),
        r"conv1.weight missing \[32, 32, 1, 1, 1\]; decoder.head.2.bias missing"
        r"|decoder.head.2.bias missing \[3\]; conv1.weight missing",
    ),
    "extra": (
        lambda p: write(p / OFFICIAL, official() | {"decoder.lora": torch.zeros(3)}),
        r"decoder.lora extra \[3\]",
    ),
    "misshapen": (
        lambda p: write(p / OFFICIAL, official() | {"conv2.bias": torch.zeros(15)}),
        r"conv2.bias misshapen: expected \[16\], found \[15\]",
    ),
    "of whole numbers": (
        lambda p: write(
            p / OFFICIAL, official() | {"conv2.bias": torch.zeros(16, dtype=torch.int8)}
        ),
        "conv2.bias of type int8",
    ),
    "not finite": (
        lambda p: write(p / OFFICIAL, official() | {"conv2.bias": torch.full((16,), torch.inf)}),
        "conv2.bias holds infinite",
    ),
    "of another number of latent channels": (
        lambda p: write(p / OFFICIAL, official() | {"conv2.weight": torch.zeros(48, 48, 1, 1, 1)}),
        "48 latent channels, expected 16",
    ),
    "a denoiser": (
        lambda p: write(p / "model.safetensors", {"patch_embedding.weight": torch.zeros(2)}),
        "not a codec of Wan2.1",
    ),
    "cut short": (cut_short, "perhaps cut short"),
    "zero bytes": (lambda p: _touch(p / OFFICIAL), "is empty"),
    "zero bytes of safetensors": (lambda p: _touch(p / "vae.safetensors"), "is empty"),
    "GGUF": (
        lambda p: _touch(p / "vae.gguf", b"GGUF\3\0\0\0" + bytes(64)),
        "not readable as weights",
    ),
    "a damaged pickle": (
        lambda p: _touch(p / OFFICIAL, b"\x80\x02h\x05."),
        r"not readable as weights, perhaps cut short \(5\)",
    ),
    "no tensors": (lambda p: write(p / OFFICIAL, {"epoch": 3}), "expected tensors by name"),
    "code": (with_code, "it may hold code, which is never run"),
    "a bare archive": (lambda p: _archive(p / OFFICIAL), "not readable as weights"),
    "TAEHV of another model": (
        lambda p: write(
            p / "taew2_2.pth", tiny() | {"decoder.22.weight": torch.zeros(12, 2, 3, 3)}
        ),
        "makes 12 values a pixel, expected 3",
    ),
    "TAEHV without a block": (
        lambda p: write(p / "t.pth", without(tiny(), "decoder.15.conv.2.bias")),
        r"decoder.15.conv.2.bias missing \[2\]",
    ),
}


def _touch(path: Path, content: bytes = b"") -> Path:
    path.write_bytes(content)
    return path


def _archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    return path


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path: Path, case: str) -> None:
    make, told = BROKEN[case]
    path = make(tmp_path)
    with pytest.raises(AsdError) as caught:
        load_codec(path)
    message = str(caught.value)
    assert re.search(told, message), message
    assert "\n" not in message and str(tmp_path) in message
    assert not (tmp_path / "was_run").exists()
