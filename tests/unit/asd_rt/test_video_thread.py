"""Frames written in a thread: all of them, in order, and no error lost."""

from __future__ import annotations

import threading
from pathlib import Path

import av
import numpy as np
import pytest

from asd_rt.errors import OutputError
from asd_rt.video import open_writer
from asd_rt.video_thread import MAX_WAITING, ThreadedWriter
from asd_rt.video_writers import Pixels, VideoWriter


class Slow(VideoWriter):
    """Keeps what it is given, when it is let; fails at frame `broken`."""

    def __init__(self, broken: int = -1) -> None:
        super().__init__("slow")
        self.let, self.frames, self.broken, self.ended = threading.Event(), [], broken, ""

    def _put(self, frame: Pixels) -> None:
        self.let.wait(10)
        if len(self.frames) == self.broken:
            raise OSError(28, "No space left on device")
        self.frames.append(int(frame[0, 0, 0]))

    def _finish(self) -> None:
        self.ended = "finished"

    def _keep_part(self) -> int:
        self.ended = "kept"
        return len(self.frames)

    def _discard(self) -> None:
        self.ended = "discarded"


def block(value: int) -> Pixels:
    return np.full((2, 4, 4, 3), value, np.uint8)


def test_frames_are_written_in_order_behind_the_back_of_the_one_who_makes_them() -> None:
    slow = Slow()
    with ThreadedWriter(slow) as writer:
        for value in range(MAX_WAITING):
            writer.write(block(value))  # returns though nothing can be written yet
        assert slow.frames == []
        slow.let.set()
        for value in range(MAX_WAITING, 9):
            writer.write(block(value))
    assert slow.frames == [value for value in range(9) for _ in range(2)]
    assert slow.ended == "finished"


def test_a_failure_reaches_the_one_who_makes_the_frames() -> None:
    slow = Slow(broken=3)
    slow.let.set()
    with (
        pytest.raises(OutputError, match=r"No space left on device.*its first 3 frames are kept"),
        ThreadedWriter(slow) as writer,
    ):
        for value in range(1000):
            writer.write(block(value))
    assert slow.ended == "kept"


def test_a_failure_at_the_last_frames_is_not_lost() -> None:
    slow = Slow(broken=1)
    with pytest.raises(OutputError, match="first 1 frames"), ThreadedWriter(slow) as writer:
        writer.write(block(0))
        slow.let.set()


def test_nothing_written_is_still_an_error() -> None:
    slow = Slow()
    with pytest.raises(OutputError, match="no frame was written"), ThreadedWriter(slow):
        pass
    assert slow.ended == "discarded"


def test_interrupted_what_was_given_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with (
        pytest.raises(KeyboardInterrupt),
        ThreadedWriter(open_writer(str(path), 16)) as writer,
    ):
        for value in range(5):
            writer.write(np.full((3, 32, 32, 3), 20 * value, np.uint8))
        raise KeyboardInterrupt
    with av.open(str(path)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 15
