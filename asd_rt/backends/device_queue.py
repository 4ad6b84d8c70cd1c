"""A block on a card: all passes, decoding and the cache pass queued at once; the host waits for the frames.

    passes  | pass, step, pass, step ... | cache pass -> may run on
    codec   |                            | latents and frames to the host
    host      queue ....................   wait for the frames

Three events hold the streams together: decoding begins with the clean latents, the host goes on with the
frames, and nothing waits for the cache pass but what is queued behind it on the same stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from asd_rt.backends.base import FloatArray
from asd_rt.backends.device_codec import DeviceCodecStream
from asd_rt.backends.device_memory import PinnedArray
from asd_rt.backends.overlap import CachePass, QueuedBlock
from asd_rt.decoding import Decoder
from asd_rt.schedule import MAX_STEPS, Step

if TYPE_CHECKING:
    from asd_rt.backends.cuda import Cuda
    from asd_rt.backends.device_denoiser import DeviceDenoiser


class _Marks:
    """Timed events of one block."""

    def __init__(self, cuda: Cuda) -> None:
        self.begin, self.clean, self.decoded, self.cache, self.cached = (
            cuda.new_event(timed=True) for _ in range(5)
        )
        self.passes = [cuda.new_event(timed=True) for _ in range(MAX_STEPS)]
        self.commits = False  # whether `cache` and `cached` are recorded

    def all(self) -> list[Any]:
        return [self.begin, self.clean, self.decoded, self.cache, self.cached, *self.passes]


class DeviceQueue:
    """See `asd_rt.backends.overlap.BlockQueue`."""

    def __init__(self, denoiser: DeviceDenoiser, stream: DeviceCodecStream) -> None:
        """The queue of videos that `denoiser` makes and `stream` decodes."""
        self._denoiser, self.stream, self._cuda = denoiser, stream, denoiser.cuda
        self._latents, self._frames = (
            PinnedArray(self._cuda, self._cuda.codec_stream) for _ in range(2)
        )
        # Two sets, for the cache pass of a block is timed when the next one's frames are there.
        self._marks, self._before = _Marks(self._cuda), _Marks(self._cuda)
        self._end = self._cuda.new_event()
        self._decoder: Decoder | None = None

    def begin(self, decoder: Decoder) -> None:
        """The next block is the first of a video that `decoder` decodes."""
        self._decoder = decoder
        self._marks.commits = self._before.commits = False

    def run(
        self,
        noise: Sequence[FloatArray],
        steps: Sequence[Step],
        frames: range,
        past_frames: int,
        commits: bool,
    ) -> QueuedBlock:
        self._marks, self._before = self._before, self._marks
        cuda, marks = self._cuda, self._marks
        marks.commits = False
        cuda.record(marks.begin, cuda.stream)
        clean = self._denoiser.queue_passes(noise, steps, frames, past_frames, marks.passes)
        cuda.record(marks.clean, cuda.stream)
        cuda.follow(cuda.codec_stream, marks.clean)
        shape = noise[0].shape
        size = noise[0].nbytes
        cuda.fetch(self._latents.room(size), clean, size, cuda.codec_stream)
        made = self._decode(clean, shape)
        cuda.record(marks.decoded, cuda.codec_stream)
        if commits:
            cuda.record(marks.cache, cuda.stream)
            self._denoiser.queue_clean(clean, shape, frames, past_frames)
            cuda.record(marks.cached, cuda.stream)
            marks.commits = True
        cuda.wait(marks.decoded)
        ends = [marks.begin, *marks.passes[: len(steps)]]
        return QueuedBlock(
            latents=self._latents.view(shape).copy(),
            frames=self._frames.view(made),
            pass_ms=[cuda.elapsed_ms(a, b) for a, b in pairwise(ends)],
            denoise_ms=cuda.elapsed_ms(marks.begin, marks.clean),
            decode_ms=cuda.elapsed_ms(marks.clean, marks.decoded),
            before=self._cache_pass(self._before),
        )

    def _decode(self, clean: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Queue the decoding of a block; returns the shape of its frames, in `_frames`."""
        if self._decoder is None:
            raise RuntimeError("a queue begins with a decoder")
        made = self._decoder.frames_shape(shape[1])
        latent_bytes, frame_bytes = 4 * int(np.prod(shape[2:])), 4 * int(np.prod(made[2:]))
        target = self._frames.room(frame_bytes * made[1])
        for step in self._decoder.steps(shape[1]):
            given = clean + step.start * latent_bytes, (1, step.size, *shape[2:])
            to = target + step.filled * frame_bytes
            self.stream.queue(given, to, step.frames * frame_bytes, step.first)
        return made

    def _cache_pass(self, marks: _Marks) -> CachePass | None:
        """What the cache pass of a block before took: it ended before the frames that were waited for."""
        if not marks.commits:
            return None
        cuda = self._cuda
        ms = cuda.elapsed_ms(marks.cache, marks.cached)
        shown, ended = (cuda.elapsed_ms(marks.clean, e) for e in (marks.decoded, marks.cached))
        return CachePass(ms, ms - min(ms, max(0.0, ended - shown)))

    def settle(self) -> None:
        self._cuda.record(self._end, self._cuda.stream)
        self._cuda.wait(self._end)

    def release(self) -> None:
        """Free all memory; the queue is of no use afterwards."""
        for host in (self._latents, self._frames):
            host.release()
        for event in (self._end, *self._marks.all(), *self._before.all()):
            self._cuda.free_event(event)
