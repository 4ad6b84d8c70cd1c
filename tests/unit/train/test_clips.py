"""Real clips: videos of every kind into latents, what is left out, and reading them again."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from asd_rt.errors import ConfigError
from train.checkpoint import load_checkpoint
from train.clip_shards import INDEX, ClipShards, batch_indices
from train.clips import main
from train.vae import WanEncoder, WanVae
from train.vae_config import WanVaeConfig

STUDENT = Path(next(iter(train.__path__))) / "tiny_student"


def write_video(
    path: Path, frames: int, fps: float = 16, size: tuple[int, int] = (32, 32), alpha: bool = False
) -> Path:
    """A video of one grey level a frame: 4 * its index."""
    codec = "png" if alpha else ("ffv1" if path.suffix == ".mkv" else "libx264")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = size
        stream.pix_fmt = "rgba" if alpha else ("bgr0" if path.suffix == ".mkv" else "yuv420p")
        for index in range(frames):
            pixels = np.full((*size, 4 if alpha else 3), 4 * index, np.uint8)
            if alpha:
                pixels[..., 3] = 0 if index % 2 else 255
            picture = av.VideoFrame.from_ndarray(pixels, format="rgba" if alpha else "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    path.with_suffix(".txt").write_text(f"caption of\n {path.stem} ")
    return path


def run(videos: Path, out: Path, *more: object) -> int:
    base = ("--videos", videos, "--out", out, "--checkpoint", STUDENT, "--size", "32x32")
    return main([str(x) for x in (*base, "--frames", "12", "--dtype", "fp32", *more)])


def levels(latents: torch.Tensor) -> list[float]:
    """Grey level of every frame of a clip, 0..255."""
    codec = load_checkpoint(STUDENT).codec
    assert codec is not None
    return (255 * codec.decode(latents[None])[0].mean(dim=(1, 2, 3))).tolist()


def test_videos_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, out = tmp_path / "videos", tmp_path / "clips"
    (videos / "below").mkdir(parents=True)
    write_video(videos / "plain.mkv", 30)
    write_video(videos / "fast.mkv", 60, fps=48)
    write_video(videos / "odd.mkv", 20, fps=Fraction(24000, 1001))
    write_video(videos / "below" / "vertical.mp4", 16, size=(96, 54))
    write_video(videos / "alpha.mov", 16, alpha=True)
    write_video(videos / "short.mkv", 11)
    write_video(videos / "silent.mkv", 12).with_suffix(".txt").unlink()
    (videos / "silent.txt").unlink(missing_ok=True)
    (videos / "broken.mp4").write_bytes((videos / "below" / "vertical.mp4").read_bytes()[:700])
    (videos / "broken.txt").write_text("broken")
    assert run(videos, out) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clips"] == 5
    assert told["rejected"].keys() == {
        "short.mkv",
        "silent.mkv",
        "broken.mp4",
    }
    assert "has 11 frames at 16 a second, a clip needs 12 (0.8 s)" in told["rejected"]["short.mkv"]
    assert "has no caption" in told["rejected"]["silent.mkv"]
    clips = ClipShards(out)
    by_name = {clip.video: i for i, clip in enumerate(clips.index.clips)}
    latents, captions = clips.read([by_name["plain.mkv"], by_name["fast.mkv"]])
    assert captions == ["caption of plain", "caption of fast"]
    assert latents.shape == (2, 12, 24, 8, 8)
    np.testing.assert_allclose(levels(latents[0]), [4 * i for i in range(12)], atol=3)
    np.testing.assert_allclose(levels(latents[1]), [12 * i for i in range(12)], atol=3)
    (see_through, upright), _ = clips.read([by_name["alpha.mov"], by_name["below/vertical.mp4"]])
    expected = [0 if i % 2 else 4 * i for i in range(12)]  # what is transparent is black
    np.testing.assert_allclose(levels(see_through), expected, atol=3)
    np.testing.assert_allclose(levels(upright), [4 * i for i in range(12)], atol=4)


def test_it_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, out = tmp_path / "videos", tmp_path / "clips"
    videos.mkdir()
    write_video(videos / "a.mkv", 40)
    assert run(videos, out, "--per-video", "0", "--shard-clips", "1") == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    write_video(videos / "b.mkv", 12)
    assert run(videos, out, "--per-video", "0", "--shard-clips", "1") == 0
    clips = ClipShards(out)
    assert [(c.video, c.start_s) for c in clips.index.clips] == [
        *(("a.mkv", i * 12 / 16) for i in range(3)),
        ("b.mkv", 0.0),
    ]
    assert all((out / name).stat().st_mtime_ns == kept for name, kept in before.items())
    capsys.readouterr()
    assert run(videos, out, "--per-video", "1") == 1
    assert "made with per_video 0, asked for is 1" in capsys.readouterr().err


def test_what_was_rejected_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "clips"
    videos.mkdir()
    write_video(videos / "a.mkv", 12).with_suffix(".txt").unlink()
    assert run(videos, out) == 1
    assert "none of 1 videos can be used" in capsys.readouterr().err
    (videos / "a.txt").write_text("a caption")
    write_video(videos / "short.mkv", 5)
    assert run(videos, out) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clips"] == 1 and told["rejected"].keys() == {"short.mkv"}
    write_video(videos / "short.mkv", 12)
    assert run(videos, out) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["clips"] == 2 and not told["rejected"]
    assert not json.loads((out / INDEX).read_text())["rejected"]


def test_the_real_encoder_in_steps(tmp_path: Path) -> None:
    """Wan's VAE, small and random: latents of a streamed clip are those of frames one step after another."""
    from safetensors.torch import save_file

    from train.clips import vae_encoder

    torch.manual_seed(0)
    vae = WanVae(WanVaeConfig(base_dim=4)).eval().requires_grad_(False)
    shapes = vae.stored_shapes()
    draw = torch.Generator().manual_seed(0)
    stored = {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(stored, tmp_path / "vae.safetensors")
    encoder = vae_encoder(tmp_path / "vae.safetensors")
    vae.load_state_dict(stored)
    frames = np.random.default_rng(0).integers(0, 256, (25, 16, 16, 3), np.uint8)
    found = encoder.encode(frames)
    step, x = WanEncoder(vae), torch.from_numpy(frames / np.float32(127.5) - np.float32(1))
    expected, caches = step(x.permute(0, 3, 1, 2)[:1], None)
    rows = [expected]
    for start in range(1, 25, 4):
        made, caches = step(x.permute(0, 3, 1, 2)[start : start + 4], caches)
        rows.append(made)
    torch.testing.assert_close(found, torch.cat(rows), atol=1e-4, rtol=1e-4)
    assert found.shape == (7, 16, 2, 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda v: (v / "lost.txt").write_text("x"),
            "1 captions have no video, the first is lost.txt",
        ),
        (
            lambda v: (v / "captions.jsonl").write_text('{"file": "c.mkv", "caption": "x"}'),
            "is c.mkv",
        ),
        (lambda v: (v / "captions.jsonl").write_text("cat.mkv: a cat"), "captions.jsonl, line 1"),
        (lambda v: (v / "a.mkv").unlink(), "holds no video"),
        (lambda v: (v / "a.mkv").write_bytes(b"junk"), "none of 1 videos can be used"),
        (lambda v: (v / "a.txt").write_bytes(b"\xff\xfe\xff"), "a.txt: cannot be read"),
    ],
)
def test_bad_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, told: str
) -> None:
    write_video(tmp_path / "a.mkv", 12)
    change(tmp_path)
    assert run(tmp_path, tmp_path / "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert told in lines[-1]
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--size", "30x32"), "multiples of 8, found 30x32"),
        (("--frames", "0"), "--frames must be a whole number >= 1"),
        (("--fps", "nan"), "--fps must be a number above 0"),
        (("--shard-clips", "0"), "--shard-clips"),
    ],
)
def test_bad_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str], told: str
) -> None:
    write_video(tmp_path / "a.mkv", 12)
    assert run(tmp_path, tmp_path / "out", *flags) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_clips_are_named(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", 12)
    out = tmp_path / "out"
    assert run(tmp_path, out) == 0
    (shard,) = out.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"clips-00000\.safetensors: cannot be read"):
        ClipShards(out)
    shard.write_bytes(whole)
    listed = json.loads((out / INDEX).read_text())
    listed["clips"].append(listed["clips"][0] | {"row": 1})
    (out / INDEX).write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match="says 2 clips"):
        ClipShards(out)


@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 8),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_every_clip_once_an_epoch_whatever_the_processes(
    count: int, batch: int, ranks: int, seed: int
) -> None:
    steps = -(-3 * count // (batch * ranks))
    read = [
        index
        for step in range(steps)
        for rank in range(ranks)
        for index in batch_indices(count, batch, step, seed, rank, ranks)
    ]
    alone = [i for step in range(steps) for i in batch_indices(count, batch * ranks, step, seed)]
    assert read == alone
    for epoch in range(3):
        assert sorted(read[epoch * count : (epoch + 1) * count]) == list(range(count))
