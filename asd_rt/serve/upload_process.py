"""The process that decodes an upload: a picture or clip on stdin, raw frames on stdout, under hard limits.

Only demuxers of the kinds below are opened, by name, so that no playlist or script can name another file. A
crash, a bomb or an endless file ends this process and nothing else.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from io import BytesIO
from typing import Any

# First bytes -> FFmpeg's demuxer; ISO media have theirs behind the size of the first box.
KINDS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "png_pipe"),
    (0, b"\xff\xd8\xff", "jpeg_pipe"),
    (8, b"WEBP", "webp_pipe"),
    (0, b"GIF8", "gif"),
    (4, b"ftyp", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
)
PICTURES = ("png_pipe", "jpeg_pipe", "webp_pipe")
REFUSED = 3  # exit code: the message on stderr is for the client


class Refused(Exception):
    """The upload cannot be used; the message is for the client."""


def kind_of(data: bytes) -> str:
    """The demuxer for `data`.

    Raises:
        Refused: it is of no kind that is taken.
    """
    for offset, magic, name in KINDS:
        if data[offset : offset + len(magic)] == magic:
            return name
    raise Refused("is no PNG, JPEG, WebP, GIF, MP4 or WebM file")


def decode(data: bytes, rows: int, columns: int, most: int, pixels: int) -> tuple[int, bytes]:
    """The first frames of `data`, cut to the shape of rows x columns around their middle and scaled to it.

    Args:
        data: the file.
        rows, columns: of the result.
        most: frames.
        pixels: that a frame may have.

    Returns:
        (frames, their raw RGB bytes).

    Raises:
        Refused: it cannot be decoded, or is too large.
    """
    import av

    kind, frames = kind_of(data), []
    try:
        with av.open(BytesIO(data), "r", format=kind, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise Refused("has no pictures")
            stream = container.streams.video[0]
            stream.thread_count = 1
            _check_size(stream.width, stream.height, pixels)
            for frame in container.decode(stream):
                _check_size(frame.width, frame.height, pixels)
                frames.append(_fitted(frame, rows, columns))
                if len(frames) >= (1 if kind in PICTURES else most):
                    break
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise Refused("cannot be decoded") from error
    if not frames:
        raise Refused("has no frames")
    return len(frames), b"".join(frames)


def _check_size(width: int, height: int, pixels: int) -> None:
    if width < 1 or height < 1:
        raise Refused("holds no picture that can be read")
    if width * height > pixels:
        raise Refused(f"has frames of {width}x{height}, more than {pixels} pixels")


def _fitted(frame: Any, rows: int, columns: int) -> bytes:
    from PIL import Image

    width, height = frame.width, frame.height
    scale = max(columns / width, rows / height)
    left = (width - columns / scale) / 2
    top = (height - rows / scale) / 2
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    box = (left, top, left + columns / scale, top + rows / scale)
    return picture.resize((columns, rows), Image.Resampling.BOX, box).tobytes()


def main() -> int:
    """Decode stdin; argv[1] is a JSON object: rows, columns, frames, pixels, seconds, memory, bytes."""
    asked = json.loads(sys.argv[1])
    os.nice(10)  # videos come first
    resource.setrlimit(resource.RLIMIT_AS, (asked["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    data = sys.stdin.buffer.read(asked["bytes"])
    try:
        count, raw = decode(data, asked["rows"], asked["columns"], asked["frames"], asked["pixels"])
    except Refused as error:
        sys.stderr.write(str(error))
        return REFUSED
    sys.stdout.buffer.write(count.to_bytes(4, "big") + raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
