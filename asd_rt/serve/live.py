"""A live video: played at the pace of its frames, and steered while it plays.

What steers it may be called from any thread; it takes effect before the next block.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.arguments import default_frames, make_plan
from asd_rt.deadline import MAX_DEADLINE_MS, DeadlinePlan
from asd_rt.errors import AsdError
from asd_rt.serve.metrics import Metrics
from asd_rt.serve.outbox import Piece
from asd_rt.serve.pool import PoolPlan
from asd_rt.serve.protocol import Settings
from asd_rt.session import FloatArray, Session
from asd_rt.stream import Stream

Frames = NDArray[np.uint8]
START_BLOCKS = 1  # blocks that are made at once when a video begins: the watcher's reserve


class LiveVideo:
    """The turns of one live video; see `asd_rt.serve.worker.Turns`."""

    def __init__(
        self,
        session: Session,
        pool: PoolPlan,
        context: FloatArray,
        settings: Settings,
        start: Frames | None,
        show: Callable[[Piece], None],
        tell: Callable[[dict[str, Any]], None],
        ended: Callable[[], None],
        save: Callable[[list[Frames], float], str],
        record_bytes: int,
        metrics: Metrics,
    ) -> None:
        """A video that begins with its first turn.

        Args:
            session: a place of the pool.
            pool: sizes of its videos.
            context: embedding of the first prompt.
            settings: of the video.
            start: frames that it goes on from, uint8 [frames, rows, columns, 3].
            show, tell: take a block, and an event.
            ended: called when there are no more turns: the place is free.
            save: makes a clip of recorded frames at a rate; returns its id.
            record_bytes: that a recording may take.
            metrics: of the server.
        """
        self._session, self._pool = session, pool
        self._context, self._settings, self._start = context, settings, start
        self._show, self._tell, self._ended, self._save = show, tell, ended, save
        self._metrics = metrics
        self._orders: deque[Callable[[], None]] = deque()
        self._stream: Stream | None = None
        self._plan: DeadlinePlan | None = None
        self._number = self._in_video = self._prompt_id = 0
        self._due = 0.0
        self._paused = self._closed = False
        self._recording: list[Frames] | None = None
        self._record_bytes, self._recorded_bytes = record_bytes, 0

    # What the watcher asks for.

    def switch(self, context: FloatArray, prompt_id: int, recache: bool = False) -> None:
        """Show another prompt from the next block on, which comes at once; see `Stream.switch_prompt`."""
        self._orders.append(partial(self._switch, context, prompt_id, recache))

    def change(self, settings: Settings, given: frozenset[str]) -> None:
        """Change steps, deadline or pace; those of `settings` that are `given`."""
        self._orders.append(partial(self._change, settings, given))

    def pause(self) -> None:
        """Make no more blocks."""
        self._orders.append(partial(self._hold, True))

    def resume(self) -> None:
        """Go on."""
        self._orders.append(partial(self._hold, False))

    def reset(self, seed: int | None) -> None:
        """Begin the video again, with another seed if one is given."""
        self._orders.append(partial(self._reset, seed))

    def record(self) -> None:
        """Keep the frames from now on."""
        self._orders.append(self._record)

    def save(self) -> None:
        """Make a clip of what was kept."""
        self._orders.append(self._stop_recording)

    def close(self) -> None:
        """End it."""
        self._closed = True

    # What the worker asks for.

    def due(self) -> float:
        if self._closed:
            return -math.inf
        if self._orders:
            return 0.0
        return math.inf if self._paused else self._due

    def turn(self) -> bool:
        while self._orders and not self._closed:
            self._orders.popleft()()
        if self._closed or self._paused:
            return not self._closed
        if self._stream is None:
            self._stream = self._begin()
        now = monotonic()
        block = next(self._stream, None)
        if block is None:
            self._paused = True
            self._tell(
                {"type": "ended", "message": "the video is as long as this engine makes one"}
            )
            return True
        frames, report = block.frames, block.deadline
        if frames is None:
            raise AsdError("the engine decoded no frames")
        missed = self._settings.deadline_ms is not None and report is not None and report.missed
        header = {
            "block": self._number,
            "prompt_id": self._prompt_id,
            "steps": block.steps,
            "block_ms": round(block.block_ms, 3),
            "missed": missed,
            "fps": self._fps,
        }
        self._show(Piece(self._number, self._prompt_id, frames, header, monotonic()))
        self._metrics.block_seconds.labels("live").observe(block.block_ms / 1e3)
        if missed:
            self._metrics.missed.inc()
        self._keep(frames)
        self._pace(now, len(frames) / self._fps)
        return True

    def end(self, error: AsdError | None) -> None:
        if self._stream is not None:
            self._stream.close()
        if error is not None:
            self._tell({"type": "error", "code": "failed", "message": str(error), "fatal": True})
        self._ended()

    @property
    def _fps(self) -> float:
        return self._settings.fps or float(self._session.manifest.fps)

    def _pace(self, begun: float, period: float) -> None:
        """When the next block is due: a period after this one was, however long it took."""
        self._number += 1
        self._in_video += 1
        if self._in_video <= START_BLOCKS:
            self._due = begun
            return
        if begun - self._due > period:  # time that is lost is not made up for
            self._metrics.late.inc()
            self._due = begun
        self._due += period

    def _begin(self) -> Stream:
        """The video from its start."""
        session, settings = self._session, self._settings
        steps, first_steps = self._steps()
        # Steps can be changed in a plan that has all the time there is.
        self._plan = DeadlinePlan(
            deadline_ms=settings.deadline_ms or MAX_DEADLINE_MS,
            steps=steps,
            first_steps=first_steps,
            costs=session.costs,
        )
        self._in_video, self._due = 0, monotonic()
        initial = None if self._start is None else session.start_latents(self._start)
        frames = self._pool.live_frames
        if frames and initial is not None:  # what the cache holds besides the start
            frames = min(frames, default_frames(session.manifest, initial.shape[1]))
        return session.generate_from(
            self._context,
            settings.seed or 0,
            frames,
            latent_hw=self._pool.latent_hw,
            initial=initial,
            refresh_every=self._pool.refresh_every,
            plan=self._plan,
        )

    def _steps(self) -> tuple[int, int]:
        """Steps of later blocks and of the first one: at most, where there is a deadline."""
        s = self._settings
        plan = make_plan(self._session.manifest, s.steps, s.first_steps, s.deadline_ms)
        return plan.steps, plan.first_steps

    def _switch(self, context: FloatArray, prompt_id: int, recache: bool) -> None:
        self._context, self._prompt_id = context, prompt_id
        if self._stream is not None:
            self._stream.switch_prompt(context, recache)
        self._due = monotonic()

    def _change(self, settings: Settings, given: frozenset[str]) -> None:
        changed = {name: getattr(settings, name) for name in given}
        self._settings = replace(self._settings, **changed)
        if self._plan is not None:
            self._plan.steps, self._plan.first_steps = self._steps()
            self._plan.deadline_ms = self._settings.deadline_ms or MAX_DEADLINE_MS

    def _hold(self, paused: bool) -> None:
        self._paused = paused
        self._due = monotonic()

    def _reset(self, seed: int | None) -> None:
        if seed is not None:
            self._settings = replace(self._settings, seed=seed)
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._paused, self._due = False, monotonic()

    def _record(self) -> None:
        self._recording, self._recorded_bytes = [], 0

    def _keep(self, frames: Frames) -> None:
        if self._recording is None or self._recorded_bytes + frames.nbytes > self._record_bytes:
            return  # a full one waits to be saved
        self._recording.append(frames)
        self._recorded_bytes += frames.nbytes
        if self._recorded_bytes + frames.nbytes > self._record_bytes:
            self._stop_recording()

    def _stop_recording(self) -> None:
        frames, self._recording = self._recording, None
        if not frames:
            self._tell({"type": "error", "code": "record", "message": "nothing was recorded"})
            return
        count = sum(map(len, frames))
        try:
            clip = self._save(frames, self._fps)
        except AsdError as error:
            self._recording = frames  # nothing is lost: it goes on, and can be saved later
            self._tell({"type": "error", "code": "unsaved", "message": str(error)})
            return
        self._tell({"type": "recorded", "id": clip, "frames": count})
