"""Writers that take frames as they come: what they share, PNG folders, and y4m on stdout."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from abc import ABC, abstractmethod
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import OutputError

if TYPE_CHECKING:
    import av

log = logging.getLogger(__name__)

FRAME_NAME = r"frame_\d{6}\.png"
Pixels = NDArray[np.uint8]


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path`, this process's own."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


class VideoWriter(ABC):
    """Takes the frames of one video.

    The end of the `with` block finishes the video. When the block is left by an error or by Ctrl-C,
    what was written until then is finished too and kept under its name; where nothing was written,
    nothing stays behind.

    Attributes:
        name: the target, for messages.
        frames_written: so far.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.frames_written = 0
        self._open = True

    def write(self, frames: Pixels) -> None:
        """Append `frames`, uint8 [F, H, W, 3], all of one size.

        Raises:
            OutputError: no space, or the reader has gone. The message says what was kept; the
                writer is closed then.
        """
        for frame in frames:
            try:
                self._put(frame)
            except OSError as error:
                raise OutputError(self._fail(error)) from error
            self.frames_written += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._open:
            return
        if not self.frames_written:
            self._open = False
            self._discard()
            if kind is None:
                raise OutputError(f"{self.name}: no frame was written, so no video was made")
            return
        try:
            self._finish()
        except OSError as failure:
            raise OutputError(self._fail(failure)) from failure
        self._open = False
        if kind is not None:
            log.warning(
                "%s: stopped early; its first %d frames are kept", self.name, self.frames_written
            )

    def _fail(self, error: OSError) -> str:
        """Save what can be played after `error`; returns the line that tells the user."""
        self._open = False
        kept = self._keep_part()
        fate = (
            f"its first {kept} frames are kept and can be played"
            if kept
            else "nothing of it was kept"
        )
        return (
            f"{self.name}: writing failed after {self.frames_written} frames "
            f"({error.strerror or error}); {fate}; free some space or choose another --out"
        )

    @abstractmethod
    def _put(self, frame: Pixels) -> None:
        """Write one frame; OSError when that fails."""

    @abstractmethod
    def _finish(self) -> None:
        """Make the video whole and give it its name."""

    @abstractmethod
    def _keep_part(self) -> int:
        """After an error: keep the playable part; returns its frames, 0 when nothing is left."""

    @abstractmethod
    def _discard(self) -> None:
        """Leave nothing behind."""


class FolderWriter(VideoWriter):
    """frame_000000.png and so on, in a folder of their own."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._temporary = temporary_path(path)
        self._encoder: av.VideoCodecContext | None = None

    def _put(self, frame: Pixels) -> None:
        import av

        if self._encoder is None:
            self._temporary.mkdir()
            self._encoder = av.VideoCodecContext.create("png", "w")
            self._encoder.height, self._encoder.width = frame.shape[:2]
            self._encoder.pix_fmt = "rgb24"
            self._encoder.time_base = Fraction(1)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts = self.frames_written
        path = self._temporary / f"frame_{self.frames_written:06d}.png"
        try:
            path.write_bytes(b"".join(bytes(packet) for packet in self._encoder.encode(picture)))
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def _finish(self) -> None:
        if self._path.is_dir():  # empty, or frames of an earlier run: check_output has looked
            for old in self._path.iterdir():
                old.unlink()
            self._path.rmdir()
        os.replace(self._temporary, self._path)

    def _keep_part(self) -> int:
        if not self.frames_written:
            self._discard()
            return 0
        try:
            self._finish()
        except OSError:
            self._discard()
            return 0
        return self.frames_written

    def _discard(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)


class PipeWriter(VideoWriter):
    """y4m (4:4:4) on stdout, frame by frame, for a player or an encoder that reads the pipe."""

    def __init__(self, fps: float) -> None:
        super().__init__("stdout")
        self._rate = Fraction(fps).limit_denominator(1001)
        self._pipe = sys.stdout.buffer

    def _put(self, frame: Pixels) -> None:
        import av

        if not self.frames_written:
            height, width = frame.shape[:2]
            rate = f"{self._rate.numerator}:{self._rate.denominator}"
            header = f"YUV4MPEG2 W{width} H{height} F{rate} Ip A1:1 C444 XCOLORRANGE=LIMITED\n"
            self._pipe.write(header.encode("ascii"))
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        planes = picture.reformat(format="yuv444p").to_ndarray()
        self._pipe.write(b"FRAME\n" + planes.tobytes())
        self._pipe.flush()

    def _fail(self, error: OSError) -> str:
        if not isinstance(error, BrokenPipeError):
            return super()._fail(error)
        self._open = False
        self._silence()
        return f"stdout: its reader has gone after {self.frames_written} frames; stopped"

    def _finish(self) -> None:
        self._pipe.flush()

    def _keep_part(self) -> int:
        self._silence()
        return self.frames_written

    def _discard(self) -> None:
        """Nothing was written."""

    def _silence(self) -> None:
        """Send what Python still holds for stdout nowhere, else it complains when it exits."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._pipe.fileno())
        os.close(nowhere)
