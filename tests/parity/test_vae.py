"""The video codecs through ONNX Runtime against whole clips by diffusers, and TAEHV against its own rule.

diffusers' side runs as its users run it: random weights of the real structure, saved in its own format.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip(
    "diffusers", reason="diffusers is the other side of this comparison"
)

import av  # noqa: E402

import asd_rt  # noqa: E402
from asd_rt.backends.ort import open_engine  # noqa: E402
from asd_rt.config import ModelConfig  # noqa: E402
from asd_rt.decoding import Decoder, Encoder, codec_memory, frame_count  # noqa: E402
from asd_rt.manifest import read_manifest, verify  # noqa: E402
from asd_rt.video import open_writer, to_uint8  # noqa: E402
from export.build import main  # noqa: E402
from train.checkpoint import save_checkpoint  # noqa: E402
from train.deployment import Deployment  # noqa: E402
from train.model import WanModel  # noqa: E402
from train.vae_weights import load_codec  # noqa: E402

pytestmark = pytest.mark.slow  # torch.export takes its time over graphs of this depth

HW = (4, 6)
LATENT_FRAMES = 7
TOLERANCE = 1e-3
CONFIG = ModelConfig(
    dim=24,
    ffn_dim=16,
    freq_dim=4,
    text_dim=3,
    text_len=4,
    in_dim=16,
    out_dim=16,
    num_heads=2,
    num_layers=1,
)


def random_vae(num_res_blocks: int) -> Any:
    """AutoencoderKLWan with 8 channels where the real one has 96; of the real depth with 2 blocks a stage."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=num_res_blocks)
    for name, parameter in vae.eval().requires_grad_(False).named_parameters():
        torch.nn.init.normal_(parameter, mean=float("gamma" in name), std=0.15)
    return vae


def whole_clip(vae: Any) -> tuple[Tensor, ...]:
    """Latents [F, 16, h, w] and their frames by diffusers; other frames in 0..1 and their latents."""
    latents = torch.randn(1, 16, LATENT_FRAMES, *HW, generator=torch.Generator().manual_seed(1))
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    frames = vae.decode(latents * std + mean).sample
    shown = torch.rand(
        1, 3, frames.shape[2], *frames.shape[3:], generator=torch.Generator().manual_seed(2)
    )
    encoded = (vae.encode(shown * 2 - 1).latent_dist.mode() - mean) / std
    return tuple(x[0].transpose(0, 1) for x in (latents, frames, shown, encoded))


@pytest.fixture(scope="module")
def vae() -> Any:
    """Half as deep as the real one, layer by layer of the same kinds: exports take so much less time."""
    return random_vae(1)


@pytest.fixture(scope="module")
def deep_vae() -> Any:
    return random_vae(2)


@pytest.fixture(scope="module")
def clip(vae: Any) -> tuple[Tensor, ...]:
    return whole_clip(vae)


@pytest.fixture(scope="module")
def saved(vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "student"
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    torch.nn.init.normal_(model.head.head.weight, std=0.2)
    save_checkpoint(folder, CONFIG, model.state_dict(), Deployment(block_frames=3))
    return folder


@pytest.fixture(scope="module")
def live_engine(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with TAEHV."""
    out = tmp_path_factory.mktemp("live")
    torch.save(taehv_weights(), out / "taew2_1.pth")
    words = ["--checkpoint", str(student), "--target", "onnx", "--out", str(out)]
    assert main([*words, "--vae", str(out / "taew2_1.pth")]) == 0
    return out / "asd_fp32.onnx"


@pytest.fixture(scope="module")
def engine(
    live_engine: Path, saved: Path, student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same with the VAE, which replaced TAEHV and nothing else."""
    out = tmp_path_factory.mktemp("engines") / "engines"
    shutil.copytree(live_engine.parent, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    words = ["--checkpoint", str(student), "--target", "onnx", "--out", str(out)]
    assert main([*words, "--vae", str(saved.parent)]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    codec = {name for name in before if name.startswith("taehv_")}
    assert len(codec) == 3 and codec.isdisjoint(after)
    kept = before.keys() - codec - {"asd_fp32.onnx.json"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    verify(out / "asd_fp32.onnx", read_manifest(out / "asd_fp32.onnx"))
    return out / "asd_fp32.onnx"


@pytest.fixture(scope="module")
def opened(engine: Path) -> Iterator[Any]:
    whole = open_engine(engine, read_manifest(engine))
    yield whole
    whole.close()


@pytest.mark.parametrize("block", [3, 1, 2])
def test_streaming_decode_is_the_whole_clip(opened: Any, clip: Any, block: int) -> None:
    latents, frames = clip[0].numpy(), clip[1].numpy()
    decoder = Decoder(opened, HW)
    found = [
        decoder.decode(latents[None, i : i + block]).copy() for i in range(0, len(latents), block)
    ]
    if block == 3:
        assert [made.shape[1] for made in found] == [9, 12, 4]
    whole = np.concatenate(found, axis=1)[0]
    assert whole.shape == frames.shape
    assert np.abs(whole - frames).max() <= TOLERANCE
    assert frames.std() > 0.3 and (np.abs(frames) < 1).mean() > 0.3, "nothing was compared"


@pytest.mark.parametrize("sizes", [(25,), (1, 4, 8, 12), (5, 4, 4, 4, 4, 4)])
def test_streaming_encode_is_the_whole_clip(opened: Any, clip: Any, sizes: tuple[int, ...]) -> None:
    shown, latents = clip[2].numpy() * 2 - 1, clip[3].numpy()
    encoder, start, found = Encoder(opened, HW), 0, []
    for size in sizes:
        found.append(encoder.encode(shown[None, start : start + size]))
        start += size
    whole = np.concatenate(found, axis=1)[0]
    assert whole.shape == latents.shape
    assert np.abs(whole - latents).max() <= TOLERANCE
    assert latents.std() > 0.1, "nothing was compared"


def test_a_second_video_forgets_the_first(opened: Any, clip: Any) -> None:
    decoder = Decoder(opened, HW)
    first = decoder.decode(clip[0][None, :3].numpy()).copy()
    decoder.decode(clip[0][None, 3:6].numpy())
    decoder.reset()
    np.testing.assert_array_equal(decoder.decode(clip[0][None, :3].numpy()), first)


def test_the_bundle_writes_a_video(engine: Path, vae: Any, tmp_path: Path) -> None:
    context = np.random.default_rng(0).standard_normal((1, 4, 3)).astype(np.float32)
    with asd_rt.open(engine) as session:
        with open_writer(tmp_path / "out.mp4", session.manifest.fps) as writer:
            blocks = []
            for block in session.generate_from(context, frames=7, latent_hw=HW):
                writer.write(block.frames)
                blocks.append(block)
        latents = torch.from_numpy(np.concatenate([b.latents for b in blocks], axis=1))
        pixels = np.concatenate([b.frames for b in blocks])
        assert [len(b.frames) for b in blocks] == [9, 12, 12]
        again = session.encode(pixels[:5])
    with av.open(tmp_path / "out.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == frame_count(4, 9) == len(pixels)
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    frames = vae.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2).numpy()
    assert np.abs(pixels.astype(int) - to_uint8(frames).astype(int)).max() <= 1
    shown = torch.from_numpy(pixels[:5]).movedim(3, 0)[None] / 127.5 - 1
    expected = (vae.encode(shown).latent_dist.mode() - mean) / std
    assert np.abs(again - expected.transpose(1, 2).numpy()).max() <= TOLERANCE


def test_the_manifest_tells_the_memory(opened: Any, saved: Path, clip: Any) -> None:
    """Of the real one's 1.9 GB see tests/unit/export/test_codec.py."""
    manifest = opened.manifest
    assert manifest.codec["kind"] == "wan" and manifest.codec["temporal"] == 4
    assert manifest.parity["codec"]["largest"]["decoder"] <= TOLERANCE
    with torch.inference_mode():
        _, caches = load_codec(saved).decoder(clip[0][:1], None)
    states = [name for name in manifest.parts["decoder"].inputs if name.startswith("state.")]
    assert len(states) == len(caches) > 20
    expected = sum(cache.nbytes for cache in caches)
    assert codec_memory(manifest, "decoder", HW).state_bytes == expected


@torch.inference_mode()
def stream(step: Any, x: Tensor, size: int) -> Tensor:
    """A first frame, then `size` at a time."""
    made, caches = step(x[:1], None)
    rows = [made]
    for start in range(1, len(x), size):
        made, caches = step(x[start : start + size], caches)
        rows.append(made)
    return torch.cat(rows)


def test_torch_streams_the_real_depth(deep_vae: Any, tmp_path: Path) -> None:
    """What is exported, before it is: every layer of the real one, by its name in diffusers' files."""
    deep_vae.save_pretrained(tmp_path / "vae")
    codec = load_codec(tmp_path / "vae")
    latents, frames, shown, encoded = whole_clip(deep_vae)
    assert (stream(codec.decoder, latents, 3) - frames).abs().max() <= TOLERANCE
    assert (stream(codec.encoder, shown * 2 - 1, 8) - encoded).abs().max() <= TOLERANCE
    assert frames.std() > 0.3 and encoded.std() > 0.1, "nothing was compared"


# TAEHV: the whole clip at once, each memory block seeing its input one frame later, zeros first.


def whole_clip_rule(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Frames in 0..1 of latents [F, C, h, w], by the layers' stored names."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = weights[f"decoder.{name}.weight"]
        return F.conv2d(
            x, weight, weights.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2
        )

    x = conv(torch.tanh(latents / 3) * 3, "1").relu()
    for start, times in ((3, 1), (9, 2), (15, 2)):
        for block in range(start, start + 3):
            past = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            y = conv(torch.cat([x, past], 1), f"{block}.conv.0").relu()
            x = (conv(conv(y, f"{block}.conv.2").relu(), f"{block}.conv.4") + x).relu()
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = conv(x, f"{start + 4}.conv")
        x = conv(x.reshape(-1, x.shape[1] // times, *x.shape[2:]), f"{start + 5}")
    return conv(x.relu(), "22").clamp(0, 1)[3:]


def taehv_weights(widths: tuple[int, ...] = (24, 16, 8, 8)) -> dict[str, Tensor]:
    """Random weights of taew2_1's layout, with some of its encoder, which is not read."""
    draw = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"1.weight": (widths[0], 16, 3, 3), "1.bias": (widths[0],)}
    for stage, times in enumerate((1, 2, 2)):
        start, width = 3 + 6 * stage, widths[stage]
        for block in range(start, start + 3):
            for i, inputs in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"{block}.conv.{i}.weight"] = (width, inputs, 3, 3)
                shapes[f"{block}.conv.{i}.bias"] = (width,)
        shapes[f"{start + 4}.conv.weight"] = (times * width, width, 1, 1)
        shapes[f"{start + 5}.weight"] = (widths[stage + 1], width, 3, 3)
    shapes |= {"22.weight": (3, widths[3], 3, 3), "22.bias": (3,)}
    made = {}
    for name, shape in shapes.items():
        fan = int(np.prod(shape[1:])) or 1
        made[f"decoder.{name}"] = torch.randn(shape, generator=draw) * (1.4 / fan**0.5)
    made["decoder.22.weight"] *= 0.01  # so that few values are cut at 0 and 1
    made["decoder.22.bias"].fill_(0.5)
    return made | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}


@pytest.mark.parametrize("block", [3, 1, 8])
def test_taehv_is_its_whole_clip_rule(live_engine: Path, block: int) -> None:
    latents = torch.randn(8, 16, *HW, generator=torch.Generator().manual_seed(1))
    expected = (whole_clip_rule(taehv_weights(), latents) * 2 - 1).numpy()
    assert expected.std() > 0.1 and (np.abs(expected) < 1).mean() > 0.2, "nothing was compared"
    opened = open_engine(live_engine, read_manifest(live_engine))
    assert opened.manifest.codec["kind"] == "taehv"
    decoder = Decoder(opened, HW)
    found = [
        decoder.decode(latents[None, i : i + block].numpy()).copy() for i in range(0, 8, block)
    ]
    assert np.abs(np.concatenate(found, axis=1)[0] - expected).max() <= 5e-5  # 1.8e-5 with AVX2
    opened.close()


def test_the_same_codec_is_not_built_again(
    live_engine: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = live_engine.parent
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    words = ["--checkpoint", str(student), "--target", "onnx", "--out", str(out)]
    for more in ([], ["--vae", str(out / "taew2_1.pth")]):
        assert main([*words, *more]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


# The official layout: names by diffusers' own converter.


def official_names(vae: Any) -> dict[str, Tensor]:
    """The weights of `vae` under names that diffusers' converter turns into its own, each once."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    from train.vae import WanVae
    from train.vae_config import WanVaeConfig

    with torch.device("meta"):
        names = WanVae(WanVaeConfig(base_dim=8)).stored_shapes()
    tags = {name: torch.tensor(i) for i, name in enumerate(names)}
    renamed = {int(tag): key for key, tag in convert_wan_vae_to_diffusers(tags).items()}
    state = vae.state_dict()
    assert sorted(renamed.values()) == sorted(state), "the converter knows other names"
    return {name: state[renamed[i]] for i, name in enumerate(names)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_official_files_hold_the_same_vae(
    deep_vae: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = {name: t.to(dtype) for name, t in official_names(deep_vae).items()}
    torch.save(stored, tmp_path / "Wan2.1_VAE.pth")
    codec = load_codec(tmp_path)
    assert (codec.kind, codec.channels) == ("wan", 16)
    deep_vae.save_pretrained(tmp_path / "vae")
    expected = load_codec(tmp_path / "vae")
    for side in ("decoder", "encoder"):
        state, other = (getattr(c, side).state_dict() for c in (codec, expected))
        names = [name for name in state if name.startswith(f"{side}.")]
        assert len(names) > 50
        for name in names:
            assert torch.equal(state[name], other[name].to(dtype).float()), name
