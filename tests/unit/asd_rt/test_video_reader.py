"""Pictures and clips that a video starts from: real small files, and what is wrong with them."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import asd_rt
from asd_rt.errors import ConfigError, MediaError
from asd_rt.manifest import Manifest, read_manifest
from asd_rt.video import open_writer
from asd_rt.video_reader import MAX_PIXELS, read_clip, read_picture

RED, BLUE = (220, 20, 20), (20, 20, 220)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """The packaged engine's: 32x32 pixels, blocks of 3 frames, 16 a second, a window of 12."""
    return read_manifest(Path(asd_rt.__file__).parent / "engine" / "asd_fp32.onnx")


def two_halves(width: int, height: int) -> Image.Image:
    """Left half red, right half blue."""
    picture = Image.new("RGB", (width, height), RED)
    picture.paste(BLUE, (width // 2, 0, width, height))
    return picture


def close(found: np.ndarray, wanted: tuple[int, ...], tolerance: int = 8) -> bool:
    return bool((np.abs(found.astype(int) - wanted) <= tolerance).all())


@pytest.mark.parametrize(
    "name", ["x.png", "x.jpg", "x.webp", "x.bmp", "x.tiff", "x.gif", "x%d.jpg"]
)
def test_pictures_of_every_kind_fill_a_block(manifest, tmp_path, caplog, name) -> None:
    two_halves(96, 64).save(tmp_path / name)
    frames = read_picture(tmp_path / name, manifest)
    assert frames.shape == (3, 32, 32, 3) and frames.dtype == np.uint8
    assert (frames == frames[0]).all()
    assert close(frames[0, :, :12], RED, 30) and close(frames[0, :, 20:], BLUE, 30)
    (record,) = caplog.records
    assert "96x64 cropped to its middle 64x64, scaled to 32x32" in record.message


def test_a_picture_of_the_right_size_is_taken_as_it_is(manifest, tmp_path, caplog) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "x.png", manifest)[0], pixels)
    assert not caplog.records


def test_odd_tall_and_tiny_pictures(manifest, tmp_path) -> None:
    for size in ((1, 1), (33, 31), (7, 401), (401, 7)):
        two_halves(*size).save(tmp_path / "x.png")
        assert read_picture(tmp_path / "x.png", manifest).shape == (3, 32, 32, 3)


def test_what_is_transparent_is_black(manifest, tmp_path) -> None:
    pixels = np.full((32, 32, 4), 255, np.uint8)
    pixels[:16, :, 3], pixels[16:20, :, 3] = 0, 128
    Image.fromarray(pixels).save(tmp_path / "x.png")
    frame = read_picture(tmp_path / "x.png", manifest)[0]
    assert (frame[:16] == 0).all() and (frame[20:] == 255).all()
    assert close(frame[16:20], (128,) * 3, 1)


def test_a_photo_is_turned_upright(manifest, tmp_path) -> None:
    picture = two_halves(64, 64)
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: what lies left belongs up
    picture.save(tmp_path / "x.jpg", exif=exif, quality=95)
    frame = read_picture(tmp_path / "x.jpg", manifest)[0]
    assert close(frame[:12], RED, 30) and close(frame[20:], BLUE, 30)


def write_clip(path: Path, frames: int, fps: float, size: int = 32) -> None:
    """Frame i is grey level 8 * i."""
    levels = (8 * np.arange(frames) % 256).astype(np.uint8)
    with open_writer(path, fps) as writer:
        writer.write(np.broadcast_to(levels[:, None, None, None], (frames, size, size, 3)).copy())


@pytest.mark.parametrize(
    ("frames", "fps", "levels"),
    [
        (9, 16, range(9)),
        (11, 16, range(2, 11)),  # the window leaves room for 9 beside the next block
        (7, 16, range(1, 7)),  # whole blocks, from the end
        (22, 32, range(4, 22, 2)),
        (5, 8, (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)[1:]),
    ],
)
def test_clips_go_on_from_their_end_at_the_engines_rate(
    manifest, tmp_path, caplog, frames, fps, levels
) -> None:
    write_clip(tmp_path / "x.mp4", frames, fps)
    clip = read_clip(tmp_path / "x.mp4", manifest)
    assert clip.shape == (len(levels), 32, 32, 3)
    np.testing.assert_allclose(clip[:, 16, 16, 0], [8 * level for level in levels], atol=3)
    assert len(caplog.records) == (0 if (frames, fps) == (9, 16) else 1)


def test_a_clip_of_another_size_and_from_memory(manifest, tmp_path, caplog) -> None:
    write_clip(tmp_path / "x.gif", 6, 10, size=50)
    data = io.BytesIO((tmp_path / "x.gif").read_bytes())
    assert read_clip(data, manifest, "upload").shape == (9, 32, 32, 3)
    (record,) = caplog.records
    assert record.message.startswith("upload: ") and "scaled from 50x50 to 32x32" in record.message
    assert record.levelno == logging.WARNING


def test_a_codec_of_several_frames_takes_one_and_then_so_many(stream_toy, tmp_path) -> None:
    two = stream_toy.manifest  # 2 frames a latent frame, blocks of 3
    two_halves(32, 32).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png", two).shape == (5, 4, 2, 3)
    write_clip(tmp_path / "x.mp4", 30, 16)
    assert len(read_clip(tmp_path / "x.mp4", two)) == 29  # 15 latent frames
    write_clip(tmp_path / "x.mp4", 60, 16)
    assert len(read_clip(tmp_path / "x.mp4", two)) == 41  # 21: as many as it is asked to remember
    write_clip(tmp_path / "x.mp4", 4, 16)
    with pytest.raises(
        MediaError, match="has 4 frames at 16 a second, but a start needs at least 5"
    ):
        read_clip(tmp_path / "x.mp4", two)


def png_of(width: int, height: int) -> bytes:
    """A black-and-white picture of any size in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * min(height, 9000)), 9)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data) for kind, data in ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
    )


@pytest.mark.parametrize("read", [read_picture, read_clip])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk" * 100,
        b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        png_of(64, 64)[:45],
        png_of(0, 0),
        png_of(60_000, 60_000),
    ],
    ids=["empty", "junk", "playlist", "concat", "cut", "no pixels", "huge"],
)
def test_damaged_and_hostile_files_are_one_line(manifest, tmp_path, read, data) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(MediaError) as caught:
        read(tmp_path / "x.png", manifest)
    assert str(caught.value).startswith(f"{tmp_path}/x.png: ")
    assert "\n" not in str(caught.value)


def test_too_many_pixels(manifest, tmp_path) -> None:
    side = int(MAX_PIXELS**0.5) + 8
    (tmp_path / "x.png").write_bytes(png_of(side, side))
    with pytest.raises(MediaError, match=r"64 million pixels"):
        read_picture(tmp_path / "x.png", manifest)


def test_absent_files_and_engines_without_a_size(manifest, tmp_path) -> None:
    with pytest.raises(MediaError, match="No such file"):
        read_picture(tmp_path / "none.png", manifest)
    with pytest.raises(MediaError, match="cannot be read"):
        read_clip(tmp_path, manifest)
    with pytest.raises(ConfigError, match="fixes no latent size"):
        read_picture(tmp_path / "none.png", replace(manifest, latent_hw=None))


def test_sound_alone_holds_no_pictures(manifest, tmp_path) -> None:
    import av

    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="holds no pictures"):
        read_clip(tmp_path / "x.mp4", manifest)
