"""Clips: videos that are downloaded whole, as .mp4: those asked for over HTTP, and recordings of live ones.

Finished clips are held in memory, a fixed number of bytes of them; the oldest go.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import AsdError
from asd_rt.serve.ids import Ids
from asd_rt.serve.limits import Limits
from asd_rt.serve.metrics import Metrics
from asd_rt.serve.pool import PoolPlan
from asd_rt.serve.protocol import Settings
from asd_rt.session import FloatArray, Session
from asd_rt.stream import Stream
from asd_rt.video import open_writer

Frames = NDArray[np.uint8]
OVER = ("done", "failed", "cancelled")
ENCODING = 2  # clips whose raw frames may wait for the encoder, until which no other is begun
LOOK_AGAIN_S = 0.1
_log = logging.getLogger(__name__)


class ClipsFull(AsdError):
    """As many clips wait as may."""


@dataclass(eq=False)
class Clip:
    """One clip.

    Attributes:
        id: that nobody can guess.
        fps: frames a second.
        status: queued, running, encoding, done, failed or cancelled.
        prompt: "" of a recording.
        latent_frames: to make.
        settings: of the video.
        context: embedding of the prompt; None of a recording.
        frames: made so far, dropped when they are encoded.
        frame_count: of those.
        mp4: when it is done.
        error: when it failed.
    """

    id: str
    fps: float
    status: str = "queued"
    prompt: str = ""
    latent_frames: int = 0
    settings: Settings = field(default_factory=Settings)
    context: FloatArray | None = None
    frames: list[Frames] = field(default_factory=list)
    frame_count: int = 0
    mp4: bytes = b""
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """What a client is told."""
        found = {
            "id": self.id,
            "status": self.status,
            "prompt": self.prompt,
            "fps": self.fps,
            "frames": self.frame_count,
            "bytes": len(self.mp4),
        }
        return found | ({"error": self.error} if self.error else {})


class ClipStore:
    """All clips by id, and the turns that make those that were asked for; safe to use from any thread."""

    def __init__(
        self, session: Session, pool: PoolPlan, limits: Limits, ids: Ids, metrics: Metrics
    ) -> None:
        """Clips are made one after the other in the place `session`."""
        self._session, self._pool, self._limits, self._metrics = session, pool, limits, metrics
        self._ids = ids
        self._clips: dict[str, Clip] = {}
        self._queue: deque[Clip] = deque()
        self._encoding = 0
        self._lock = Lock()
        self._encoder = ThreadPoolExecutor(1, "clip encoder")
        self._now: Clip | None = None
        self._stream: Stream | None = None

    def ask(self, prompt: str, context: FloatArray, latent_frames: int, settings: Settings) -> Clip:
        """Queue a clip.

        Raises:
            ClipsFull: as many wait as may.
        """
        clip = Clip(
            id=self._ids.new(),
            fps=settings.fps or float(self._session.manifest.fps),
            prompt=prompt,
            latent_frames=latent_frames,
            settings=settings,
            context=context,
        )
        with self._lock:
            if len(self._queue) >= self._limits.clips_queued:
                raise ClipsFull(f"{len(self._queue)} clips wait already; try again later")
            self._queue.append(clip)
            self._keep(clip)
        return clip

    def from_frames(self, frames: list[Frames], fps: float) -> str:
        """A clip of frames that are there; returns its id.

        Raises:
            ClipsFull: too many are being encoded.
        """
        clip = Clip(self._ids.new(), fps, "encoding")
        clip.frames, clip.frame_count = frames, sum(map(len, frames))
        with self._lock:
            if self._encoding >= self._limits.clips_queued:
                raise ClipsFull("too many recordings are being saved; try again later")
            self._keep(clip)
        self._encode(clip)
        return clip.id

    def get(self, clip_id: str) -> Clip | None:
        """The clip of this id, None where there is none (any more)."""
        with self._lock:
            return self._clips.get(clip_id)

    def remove(self, clip_id: str) -> Clip | None:
        """Cancel or forget a clip."""
        with self._lock:
            clip = self._clips.pop(clip_id, None)
            if clip is not None and clip.status not in OVER:
                clip.status = "cancelled"
                if clip in self._queue:  # else whoever works on it sees it, and counts it
                    self._queue.remove(clip)
                    self._over(clip)
            return clip

    def _keep(self, clip: Clip) -> None:
        """Remember `clip`, and forget the oldest other finished ones beyond the limits."""
        self._clips[clip.id] = clip
        over = [c for c in self._clips.values() if c.status in OVER and c is not clip]
        size = sum(len(c.mp4) for c in (*over, clip))
        while over and (len(over) > self._limits.clips_kept or size > self._limits.clip_bytes):
            oldest = over.pop(0)
            size -= len(oldest.mp4)
            del self._clips[oldest.id]

    def close(self) -> None:
        """Stop encoding."""
        self._encoder.shutdown(cancel_futures=True)

    # The worker's turns.

    def due(self) -> float:
        if self._now is not None:
            return 0.0
        if not self._queue:
            return math.inf
        return 0.0 if self._encoding < ENCODING else monotonic() + LOOK_AGAIN_S

    def turn(self) -> bool:
        try:
            clip = self._now or self._begin()
            if clip is not None and self._stream is not None:
                self._step(clip, self._stream)
        except AsdError as error:
            self._fail(str(error))
        except Exception as error:  # whatever it is, clips behind this one are made
            _log.exception("a clip failed")
            self._fail(f"unexpected {type(error).__name__}")
        return True

    def end(self, error: AsdError | None) -> None:
        self._stop()

    def _begin(self) -> Clip | None:
        with self._lock:
            if not self._queue:
                return None
            self._now = clip = self._queue.popleft()
            clip.status = "running"
        s = clip.settings
        context, clip.context = clip.context, None
        if context is None:
            raise AsdError("a clip without a prompt")
        self._stream = self._session.generate_from(
            context,
            s.seed or 0,
            clip.latent_frames,
            s.steps,
            s.first_steps,
            self._pool.latent_hw,
            s.deadline_ms,
        )
        return clip

    def _step(self, clip: Clip, stream: Stream) -> None:
        block = None if clip.status == "cancelled" else next(stream, None)
        if block is not None and block.frames is not None:
            clip.frames.append(block.frames)
            clip.frame_count += len(block.frames)
            self._metrics.block_seconds.labels("clip").observe(block.block_ms / 1e3)
            return
        self._stop()
        with self._lock:
            cancelled = clip.status == "cancelled"
            if not cancelled:
                clip.status = "encoding"
        if cancelled:
            self._over(clip)
        else:
            self._encode(clip)

    def _stop(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._now = None

    def _fail(self, error: str) -> None:
        """The clip that is being made, or was about to be, is over."""
        clip = self._now
        self._stop()
        if clip is not None:
            clip.status, clip.error = "failed", error
            self._over(clip)

    def _over(self, clip: Clip) -> None:
        clip.frames = []
        self._metrics.clips.labels(clip.status).inc()

    # The encoder's thread.

    def _encode(self, clip: Clip) -> None:
        with self._lock:
            self._encoding += 1
        self._encoder.submit(self._encode_now, clip)

    def _encode_now(self, clip: Clip) -> None:
        try:
            mp4, error = to_mp4(clip.frames, clip.fps), ""
        except AsdError as failure:
            mp4, error = b"", str(failure)
        except Exception as failure:  # of the codec library, whose errors share no base class
            mp4, error = b"", f"unexpected {type(failure).__name__}"
        most = self._limits.clip_bytes
        if len(mp4) > most:
            error = f"takes {len(mp4)} bytes, this server keeps {most}; ask for fewer frames"
            mp4 = b""
        with self._lock:
            self._encoding -= 1
            if clip.status != "cancelled":
                clip.mp4, clip.error = mp4, error
                clip.status = "failed" if error else "done"
                self._keep(clip)
        self._over(clip)


def to_mp4(frames: Iterable[Frames], fps: float) -> bytes:
    """Frames, uint8 [F, H, W, 3] each, as an .mp4 file's bytes."""
    with tempfile.TemporaryDirectory(prefix="asd-rt-") as folder:
        path = Path(folder) / "clip.mp4"
        with open_writer(path, fps) as writer:
            for some in frames:
                writer.write(some)
        return path.read_bytes()
