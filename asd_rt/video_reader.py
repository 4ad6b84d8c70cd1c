"""Pictures and clips in files, as a video can start from them: upright, cropped to their middle, scaled."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from asd_rt.decoding import frame_size, start_frame_count
from asd_rt.errors import ConfigError, MediaError
from asd_rt.manifest import Manifest

if TYPE_CHECKING:
    import av

Pixels = NDArray[np.uint8]
MAX_PIXELS = 64_000_000  # of one frame; more is no picture to shrink to an engine's size
# Only what holds pictures itself: a playlist could name other files and addresses.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,mpegts,ogg,flv,yuv4mpegpipe,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"
)
_log = logging.getLogger(__name__)


def read_picture(source: str | Path | BinaryIO, manifest: Manifest, name: str = "") -> Pixels:
    """A picture, repeated so that it fills one block of the engine's.

    Args:
        source: a file (PNG, JPEG, WebP, BMP, TIFF, GIF), or one opened for reading. What is transparent
            becomes black.
        manifest: of the engine, which fixes a latent size and has an encoder.
        name: of the source, for messages; "" = its path.

    Returns:
        uint8 [frames, rows, columns, 3]: as many frames as a block of latents, or 1 + 4 (n - 1) of n where a
        latent frame is 4 frames long.

    Raises:
        MediaError: absent, no picture, damaged, or too large.
        ConfigError: the engine fixes no size.
    """
    name = name or str(source)
    size = _engine_size(manifest)
    with _opened(source, name) as container, _damage(name):
        frame = next(_frames(container, name), None)
        if frame is None:
            raise MediaError(f"{name}: holds no picture")
        shown, note = _fit(_upright(frame), size)
    if note:
        _log.warning("%s: %s", name, note)
    return np.repeat(shown[None], start_frame_count(manifest, 1), axis=0)


def read_clip(source: str | Path | BinaryIO, manifest: Manifest, name: str = "") -> Pixels:
    """The end of a clip, at the engine's frames a second: as many whole blocks as its window holds.

    Args:
        source, manifest, name: as `read_picture`, but of MP4, MOV, WebM, MKV, AVI, GIF, Ogg, FLV or y4m.

    Returns:
        uint8 [frames, rows, columns, 3], in whole blocks of latents.

    Raises:
        MediaError: absent, no clip, damaged, too large, or shorter than a block.
        ConfigError: the engine fixes no size.
    """
    name = name or str(source)
    size = _engine_size(manifest)
    taken: deque[Pixels] = deque(maxlen=start_frame_count(manifest, most_blocks(manifest)))
    count, note = 0, ""
    with _opened(source, name) as container, _damage(name):
        for frame in _at_rate(container, name, manifest.fps):
            shown, note = _fit(_upright(frame), size)
            taken.append(shown)
            count += 1
    blocks = most_blocks(manifest)
    while blocks and start_frame_count(manifest, blocks) > len(taken):
        blocks -= 1
    if not blocks:
        raise MediaError(
            f"{name}: has {count} frames at {manifest.fps} a second, but a start needs at least "
            f"{start_frame_count(manifest, 1)}; give a longer clip, or a picture of it"
        )
    kept = start_frame_count(manifest, blocks)
    if kept < count:
        cut = f"goes on from its last {kept} of {count} frames (at {manifest.fps} a second)"
        note = f"{cut}, {note}" if note else cut
    if note:
        _log.warning("%s: %s", name, note)
    return np.stack(list(taken)[-kept:])


def read_frames(path: str | Path, fps: float, size: tuple[int, int]) -> Iterator[Pixels]:
    """All frames of a clip at `fps` a second, one by one; what is not said here is as in `read_clip`.

    Args:
        path: of the clip.
        fps: frames a second that are wanted, whatever the file has.
        size: (rows, columns) of every frame; the middle of larger ones is kept.

    Returns:
        uint8 [rows, columns, 3] each.

    Raises:
        MediaError: absent, no clip, damaged or too large; perhaps behind frames that were whole.
    """
    name = str(path)
    with _opened(path, name) as container, _damage(name):
        for frame in _at_rate(container, name, fps):
            yield _fit(_upright(frame), size)[0]


def most_blocks(manifest: Manifest) -> int:
    """Blocks that the first generated one can see."""
    cache = manifest.cache
    held = cache.window_frames or cache.max_frames or 8 * cache.block_frames
    return max(1, (held - cache.block_frames) // cache.block_frames)


def _engine_size(manifest: Manifest) -> tuple[int, int]:
    """Rows and columns of the frames that the engine encodes."""
    if manifest.latent_hw is None:
        raise ConfigError(
            f"{manifest.name}: fixes no latent size, so a picture has none to be scaled to; build it with "
            "--latent-size HxW"
        )
    return frame_size(manifest, "encoder", manifest.latent_hw)


class _Nameless:
    """A file of which FFmpeg sees the bytes alone: some names have a meaning to it, such as x%d.jpg."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextmanager
def _opened(source: str | Path | BinaryIO, name: str) -> Iterator[Any]:
    """The container of `source`, which is closed at the end if it was opened here."""
    import av

    own: BinaryIO | None = None
    if isinstance(source, str | Path):
        try:
            source = own = Path(source).expanduser().open("rb")
        except OSError as error:
            raise MediaError(f"{name}: cannot be read ({error.strerror})") from error
    try:
        try:
            container = av.open(_Nameless(source), options={"format_whitelist": FORMATS})
        except (av.FFmpegError, ValueError, OSError) as error:
            raise MediaError(f"{name}: is no picture or video that can be read here") from error
        with container:
            if not container.streams.video:
                raise MediaError(f"{name}: holds no pictures")
            yield container
    finally:
        if own is not None:
            own.close()


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn FFmpeg's errors into ours."""
    import av

    try:
        yield
    except (av.FFmpegError, ValueError, OSError, MemoryError) as error:
        raise MediaError(
            f"{name}: is damaged or of a kind that cannot be decoded here ({error})"
        ) from error


def _frames(container: Any, name: str) -> Iterator[av.VideoFrame]:
    """All frames, none of them too large."""
    stream = container.streams.video[0]
    _check_size(stream.codec_context.width, stream.codec_context.height, name)
    for frame in container.decode(stream):
        _check_size(frame.width, frame.height, name)
        yield frame


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name}: {width}x{height} is more than {MAX_PIXELS // 10**6} million pixels; shrink it first"
        )


def _at_rate(container: Any, name: str, fps: float) -> Iterator[av.VideoFrame]:
    """The frames that are seen at 0, 1/fps, 2/fps ... seconds."""
    rate = float(container.streams.video[0].average_rate or fps)
    late = 0.25 / fps  # times in files are rounded
    shown, previous, begin, time = 0, None, None, 0.0
    for number, frame in enumerate(_frames(container, name)):
        found = number / rate if frame.time is None else float(frame.time)
        begin = found if begin is None else begin
        time = found - begin
        while previous is not None and shown / fps + late < time:
            yield previous
            shown += 1
        previous = frame
    while previous is not None and shown / fps + late < time + 1 / rate:
        yield previous
        shown += 1


def _upright(frame: av.VideoFrame) -> Pixels:
    """Pixels uint8 [rows, columns, 3], turned as the file says; what is transparent is black."""
    pixels = frame.to_ndarray(format="rgba")
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() < 255:
        colours = (colours * (alpha / np.float32(255)) + np.float32(0.5)).astype(np.uint8)
    return np.rot90(colours, round(frame.rotation / 90))


def _fit(pixels: Pixels, size: tuple[int, int]) -> tuple[Pixels, str]:
    """The middle of a picture at `size` (rows, columns), and what was done to it ("" = nothing)."""
    import av

    rows, columns = pixels.shape[:2]
    if (rows, columns) == size:
        return np.ascontiguousarray(pixels), ""
    height = max(1, min(rows, round(columns * size[0] / size[1])))
    width = max(1, min(columns, round(rows * size[1] / size[0])))
    top, left = (rows - height) // 2, (columns - width) // 2
    middle = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    whole = av.VideoFrame.from_ndarray(middle, format="rgb24")
    scaled = whole.reformat(width=size[1], height=size[0], interpolation="AREA")
    cropped = (
        "" if (height, width) == (rows, columns) else f"cropped to its middle {width}x{height}, "
    )
    note = f"{cropped}scaled from {width}x{height} to {size[1]}x{size[0]}"
    if cropped:
        note = f"{columns}x{rows} {cropped}scaled to {size[1]}x{size[0]}"
    result: Pixels = scaled.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return result, note
