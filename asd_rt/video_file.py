"""Videos in one file, .mp4 and .gif, written as frames come and playable wherever writing stops."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from asd_rt.video_writers import Pixels, VideoWriter, temporary_path

if TYPE_CHECKING:
    import av

log = logging.getLogger(__name__)

CRF = 16  # x264's quality: 0 loses nothing, 51 is worst; 16 looks lossless
GIF_END = b";"


def open_raw(path: Path) -> FileIO:
    """`path` without a buffer, so that a full disk is noticed at the write that meets it."""
    return FileIO(path, "wb")


class FileWriter(VideoWriter):
    """An .mp4 (H.264, yuv420p) or an endless .gif, under a temporary name until it is done."""

    def __init__(self, path: Path, fps: float, kind: str) -> None:
        super().__init__(str(path))
        self._path = path
        self._temporary = temporary_path(path)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._kind = kind
        self._encoder: _Encoder | None = None

    def _put(self, frame: Pixels) -> None:
        if self._kind == "mp4":  # 4:2:0 needs even sizes
            rows, columns = frame.shape[0] % 2, frame.shape[1] % 2
            if rows or columns:
                frame = np.pad(frame, ((0, rows), (0, columns), (0, 0)), mode="edge")
        if self._encoder is None:
            kind = _Mp4Encoder if self._kind == "mp4" else _GifEncoder
            height, width = frame.shape[:2]
            self._encoder = kind(self._temporary, height, width, self._rate)
        self._encoder.put(frame)

    def _finish(self) -> None:
        if self._encoder is not None:
            self._encoder.finish()
        if self._kind == "mp4":
            _index_first(self._temporary)
        os.replace(self._temporary, self._path)

    def _keep_part(self) -> int:
        if self._encoder is None:
            return 0
        self._encoder.close()
        kept = _count_frames(self._temporary)
        try:
            if kept:
                os.replace(self._temporary, self._path)
        except OSError:
            kept = 0
        if not kept:
            self._discard()
        return kept

    def _discard(self) -> None:
        if self._encoder is not None:
            self._encoder.close()
        self._temporary.unlink(missing_ok=True)


class _Sink:
    """A file for PyAV that remembers the first failed write and ignores all later ones.

    A muxer that is closed after a failed write would still write its index and spoil what is whole.
    After a failure the file ends where it was whole last.
    """

    def __init__(self, path: Path, end: bytes) -> None:
        self.error: OSError | None = None
        self._file = open_raw(path)
        self._end = end
        self._position = 0
        self._whole_bytes = 0

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while self.error is None and len(rest):
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                self.error = error
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self.error is None:
            self._position = self._file.seek(offset, whence)
        elif whence == os.SEEK_SET:
            self._position = offset
        return self._position

    def tell(self) -> int:
        return self._position

    def mark_whole(self) -> None:
        """What was written until now is, with `end` behind it, playable by itself."""
        if self.error is None:
            self._whole_bytes = self._position

    def close(self) -> None:
        """Close the file; a failure of that is kept as the others are."""
        if self._file.closed:
            return
        try:
            if self.error is not None:
                self._file.truncate(self._whole_bytes)
                self._file.seek(self._whole_bytes)
                self._file.write(self._end if self._whole_bytes else b"")
            self._file.close()
        except OSError as error:
            self.error = self.error or error


class _Encoder:
    """One stream of pictures in one container."""

    container = ""
    codec = ""
    options: ClassVar[dict[str, str]] = {}
    end = b""

    def __init__(self, path: Path, height: int, width: int, rate: Fraction) -> None:
        import av

        self._sink = _Sink(path, self.end)
        self._rate = rate
        self._count = 0
        options = {"flush_packets": "1", **self.options}
        self._container = av.open(self._sink, "w", format=self.container, options=options)
        stream: Any = self._container.add_stream(self.codec, rate=rate)
        stream.width, stream.height = width, height
        self._stream = stream
        self._open = True

    def put(self, frame: Pixels) -> None:
        """Encode one frame, uint8 [H, W, 3]; OSError when the file takes no more."""
        import av

        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self._count, 1 / self._rate
        self._count += 1
        self._mux(self._stream.encode(self._prepare(picture)))

    def finish(self) -> None:
        """Write what the encoder still holds, and the index."""
        self._mux(self._stream.encode())
        self.close()
        if self._sink.error is not None:
            raise self._sink.error

    def close(self) -> None:
        """Let go of the file, as far as it was written."""
        if self._open:
            self._open = False
            self._container.close()
            self._sink.close()

    def _prepare(self, picture: av.VideoFrame) -> av.VideoFrame:
        return picture

    def _mux(self, packets: Iterable[av.Packet[Any]]) -> None:
        for packet in packets:
            self._container.mux(packet)
            self._sink.mark_whole()
        if self._sink.error is not None:
            raise self._sink.error


class _Mp4Encoder(_Encoder):
    container = "mp4"
    codec = "libx264"
    # A hybrid mp4 is made of fragments until it is closed: cut off behind any of them, it plays.
    options: ClassVar[dict[str, str]] = {"movflags": "+hybrid_fragmented"}

    def __init__(self, path: Path, height: int, width: int, rate: Fraction) -> None:
        super().__init__(path, height, width, rate)
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(CRF), "preset": "veryfast"}
        self._stream.gop_size = max(1, round(rate))  # a second makes one fragment
        self._stream.codec_context.thread_count = 1  # the other cores are for the network


class _GifEncoder(_Encoder):
    container = "gif"
    codec = "gif"
    options: ClassVar[dict[str, str]] = {"loop": "0"}
    end = GIF_END

    def __init__(self, path: Path, height: int, width: int, rate: Fraction) -> None:
        super().__init__(path, height, width, rate)
        self._stream.pix_fmt = "pal8"
        self._palette = _palette_graph(width, height, rate)

    def _prepare(self, picture: av.VideoFrame) -> av.VideoFrame:
        self._palette.push(picture)
        coloured: av.VideoFrame = self._palette.pull()
        return coloured


def _palette_graph(width: int, height: int, rate: Fraction) -> Any:
    """A filter that gives each frame a palette of its own: no second pass, no banding."""
    from av import VideoFormat
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=width, height=height, format=VideoFormat("rgb24"), time_base=1 / rate
    )
    split, generate = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(generate, 0, 0)
    split.link_to(use, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def _count_frames(path: Path) -> int:
    """Frames that a player finds in `path`; 0 when it cannot open it."""
    import av

    count = 0
    try:
        with av.open(str(path)) as container:
            for _ in container.decode(video=0):
                count += 1
    except (av.FFmpegError, IndexError) as error:
        log.debug("%s: readable up to frame %d (%s)", path, count, error)
    return count


def _index_first(path: Path) -> None:
    """Move the index of a finished mp4 to its beginning, so that playback can start at once.

    Where there is no space for a copy the video stays as it is, which every player takes as well.
    """
    try:
        _copy_index_first(path)
    except OSError as error:
        log.info("%s: its index stays at its end (%s)", path.name, error)


def _copy_index_first(path: Path) -> None:
    import av

    copy = path.with_name(path.name + "2")
    options = {"movflags": "+faststart"}
    try:
        with (
            av.open(str(path)) as old,
            av.open(str(copy), "w", format="mp4", options=options) as new,
        ):
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    new.mux(packet)
        os.replace(copy, path)
    finally:
        copy.unlink(missing_ok=True)
