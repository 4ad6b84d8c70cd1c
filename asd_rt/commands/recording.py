"""One video on its way from a session into a file, and its figures."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import Event
from time import perf_counter
from typing import Any

from asd_rt import timing
from asd_rt.bench import deadline_record, timing_record
from asd_rt.commands.steer import PromptAt, Start
from asd_rt.decoding import block_frame_count, temporal_factor
from asd_rt.frame_loop import Block
from asd_rt.plan import count_blocks
from asd_rt.progress import Progress
from asd_rt.session import FloatArray, Session
from asd_rt.stream import Stream
from asd_rt.video import enlarge, open_writer
from asd_rt.video_thread import ThreadedWriter

MAX_RECORDS = 10_000  # of the newest blocks; an endless video has any number
_Figures = tuple[
    dict[str, Any], dict[str, Any]
]  # of a block: as reports show them, and for a summary


class Recording:
    """Generates a video and writes it."""

    def __init__(self, session: Session, out: str, frames: int, scale: int) -> None:
        """A video of `frames` latent frames (0 = endless) into `out`, each pixel `scale` pixels wide."""
        self._session, self._out, self._frames, self._scale = session, out, frames, scale
        self._first: list[_Figures] = []  # of the first block, which every summary needs
        self._others: deque[_Figures] = deque(maxlen=MAX_RECORDS)
        self._count = self._written = 0
        self._whole_ms = self._decode_ms = self._first_frame_ms = 0.0
        self._switched: list[dict[str, Any]] = []
        self._last: tuple[Block, int] | None = None  # its cache pass comes with the next block

    def run(
        self,
        prompt: str | FloatArray,
        later: Sequence[PromptAt] = (),
        recache: bool = False,
        start: Start | None = None,
        **asked: Any,
    ) -> None:
        """Generate and write all blocks; of the last one, only the frames that were asked for.

        An endless video ends at Ctrl-C.

        Args:
            prompt: what to show, or its embedding.
            later: prompts that replace it, in order.
            recache: compute the cache anew under each of them.
            start: what the video begins with.
            asked: for the session's `generate`.
        """
        begin = perf_counter()
        session, manifest = self._session, self._session.manifest
        if isinstance(prompt, str):
            given = None if start is None else start.frames
            stream = session.generate(prompt, frames=self._frames, start=given, **asked)
        else:
            initial = None if start is None else session.start_latents(start.frames)
            stream = session.generate_from(prompt, frames=self._frames, initial=initial, **asked)
        blocks = count_blocks(self._frames, manifest.cache.block_frames)
        with (
            ThreadedWriter(open_writer(self._out, manifest.fps)) as writer,
            Progress("blocks", blocks) as progress,
            nullcontext() if self._frames else ctrl_c() as stop,
        ):
            self._write_all(stream, writer, progress, list(later), recache, start, begin, stop)
        self._settle()

    def _write_all(
        self,
        stream: Stream,
        writer: ThreadedWriter,
        progress: Progress,
        later: list[PromptAt],
        recache: bool,
        start: Start | None,
        begin: float,
        stop: Event | None,
    ) -> None:
        manifest = self._session.manifest
        size, temporal = manifest.cache.block_frames, temporal_factor(manifest)
        first_latent: int | None = None
        shown = len(start.frames) if start is not None and start.shown else 0
        while stop is None or not stop.is_set():
            switched = None
            while later and later[0].frame <= self._written + shown:
                switched = later.pop(0)
            if switched is not None:
                stream.switch_prompt(switched.prompt, recache)
            block = next(stream, None)
            if block is None:
                return
            self._settle()
            if first_latent is None:
                first_latent = block.first_frame
                self._first_frame_ms = (perf_counter() - begin) * 1e3
                if shown and stream.start_frames is not None:
                    writer.write(enlarge(stream.start_frames, self._scale))
            if switched is not None:
                self._note(switched, block, self._written + shown, recache)
            frames, block.frames = block.frames, None
            if frames is None:
                continue
            latent = size
            if self._frames:
                latent = min(size, first_latent + self._frames - block.first_frame)
            frames = frames[: block_frame_count(temporal, block.first_frame, latent)]
            writer.write(enlarge(frames, self._scale))
            self._written += len(frames)
            self._last = block, len(frames)
            progress.advance(f"{block.block_ms:.0f} ms a block")

        stream.close()

    def _note(self, switched: PromptAt, block: Block, frame: int, recache: bool) -> None:
        self._switched.append(
            {
                "asked_frame": switched.frame,
                "frame": frame,
                "block": block.index,
                "prompt": switched.prompt,
                "recache": recache,
                "switch_ms": None if block.switch_ms is None else round(block.switch_ms, 3),
            }
        )

    def _settle(self) -> None:
        """Note the figures of the block before, which are whole now."""
        if self._last is None:
            return
        (block, frames), self._last = self._last, None
        self._count += 1
        self._whole_ms += block.block_ms
        self._decode_ms += block.decode_ms or 0.0
        shown = {"index": block.index, "frames": frames, **durations(block)}
        figures = shown, {**timing_record(block, block.index - self._count + 1), "frames": frames}
        (self._others if self._first else self._first).append(figures)

    def report(self) -> dict[str, Any]:
        """Figures of the video; frames a second count the frames that were generated and written."""
        figures, whole_ms = [*self._first, *self._others], self._whole_ms or float("inf")
        return {
            "frames": self._written,
            "latent_frames": self._frames or None,
            "steps": [shown["steps"] for shown, _ in figures],
            "blocks_left_out": self._count - len(figures),
            "switches": self._switched,
            "time_to_first_frame_ms": round(self._first_frame_ms, 3),
            "fps_with_decode": round(1e3 * self._written / whole_ms, 2),
            "fps_without_decode": round(1e3 * self._written / (whole_ms - self._decode_ms), 2),
            "blocks": [shown for shown, _ in figures],
            "summary": timing.summarise([timed for _, timed in figures]),
        }


@contextmanager
def ctrl_c() -> Iterator[Event]:
    """An event that Ctrl-C sets, so that what is under way ends whole; a second Ctrl-C interrupts it."""
    stop = Event()

    def set_or_raise(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, set_or_raise)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def durations(block: Block) -> dict[str, Any]:
    """Steps and durations of a block in ms, None for what did not run; and how it kept its deadline."""

    def rounded(value: float | None) -> float | None:
        return value if value is None or isinstance(value, bool) else round(value, 3)

    return {
        "steps": block.steps,
        "pass_ms": [round(ms, 3) for ms in block.pass_ms],
        "denoise_ms": rounded(block.denoise_ms),
        "cache_ms": rounded(block.cache_ms),
        "hidden_ms": rounded(block.hidden_ms),
        "switch_ms": rounded(block.switch_ms),
        "decode_ms": rounded(block.decode_ms),
        "block_ms": rounded(block.block_ms),
        **{name: rounded(value) for name, value in deadline_record(block).items()},
    }
