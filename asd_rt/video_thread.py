"""Encoding beside the passes: a writer in a thread of its own, never more than a few blocks behind."""

from __future__ import annotations

from queue import Queue
from threading import Thread
from types import TracebackType

from asd_rt.video_writers import Pixels, VideoWriter

MAX_WAITING = 2  # blocks; then the one who makes them waits


class ThreadedWriter:
    """Frames go to `writer` in the order they come, while the next block is made.

    Leave the `with` block and all that was given is written; an error of the writer is raised at the next
    `write`, or there. Left by an error or by Ctrl-C, the blocks that wait are still written.
    """

    def __init__(self, writer: VideoWriter) -> None:
        self._writer = writer
        self._waiting: Queue[Pixels | None] = Queue(MAX_WAITING)
        self._thread = Thread(target=self._work, name="video writer", daemon=True)
        self._error: BaseException | None = None

    def write(self, frames: Pixels) -> None:
        """Hand over `frames`, uint8 [F, H, W, 3]; they may not be changed afterwards.

        Raises:
            OutputError: the writer failed, at these or at earlier frames.
        """
        self._raise()
        self._waiting.put(frames)

    def __enter__(self) -> ThreadedWriter:
        self._writer.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._waiting.put(None)
        self._thread.join()
        own = self._error
        self._writer.__exit__(type(own) if own else kind, own or error, trace)
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        """Write what comes; after an error, only take it, so that nobody waits for a place."""
        while (frames := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    self._writer.write(frames)
                except Exception as error:  # handed to the thread that gives the frames
                    self._error = error
