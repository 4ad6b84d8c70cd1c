"""A fixed number of places for videos, each with its own KV cache, allocated before anyone comes."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from asd_rt.arguments import check_can_decode, default_frames
from asd_rt.errors import ConfigError
from asd_rt.machine import available_memory_bytes
from asd_rt.manifest import Manifest
from asd_rt.planner import is_large, plan_memory, video_of
from asd_rt.session import FloatArray, Session

MOST_SESSIONS = 8  # where nobody asks for a number
LEARNING_MS = 1e6  # a deadline that is never missed
SHARE = 0.5  # of the available memory, for a number that nobody asked for
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolPlan:
    """How many live videos there is room for.

    Attributes:
        sessions: places for live videos; one more serves clips.
        latent_hw: latent (rows, columns) of all videos.
        live_frames: latent frames of a live video; 0 = endless.
        place_bytes: memory of a place.
        shared_bytes: memory of what all share.
        refresh_every: blocks after which the cache of a live video starts over; 0 = never.
    """

    sessions: int
    latent_hw: tuple[int, int]
    live_frames: int
    place_bytes: int
    shared_bytes: int
    refresh_every: int = 0


def plan_pool(
    path: Path,
    manifest: Manifest,
    sessions: int | None = None,
    latent_hw: tuple[int, int] | None = None,
    available: int | None = None,
) -> PoolPlan:
    """Places for live videos by the engine at `path`.

    Args:
        path: for errors.
        manifest: of the engine.
        sessions: places; None = as many as fit into half of the memory, at most 8.
        latent_hw: of an engine that fixes none.
        available: bytes of memory; None = what this machine offers.

    Raises:
        ConfigError: the engine makes no video or fixes no size, or so many do not fit.
    """
    check_can_decode(path, manifest)
    size = manifest.latent_hw or latent_hw
    if size is None:
        raise ConfigError(f"{path}: fixes no latent size; say which: --latent-size HxW")
    if latent_hw is not None and latent_hw != size:
        raise ConfigError(
            f"--latent-size {latent_hw[0]}x{latent_hw[1]}: {path} is fixed to {size[0]}x{size[1]}"
        )
    cache = manifest.cache
    frames = 0 if cache.window_frames else default_frames(manifest)
    plan = plan_memory(video_of(manifest, frames, size, joined="joined" in manifest.parts))
    place = plan.cache + plan.prompt + plan.state
    shared = plan.needed - place
    if available is None:
        available = available_memory_bytes()
    if manifest.backend != "onnx":
        if sessions is not None and sessions > 1:
            raise ConfigError(
                f"--sessions {sessions}: {path} is a plan, which serves one live video at a time so far; "
                "leave --sessions out, or serve an ONNX engine"
            )
        return PoolPlan(1, size, frames, place, shared)
    if sessions is None:
        room = MOST_SESSIONS
        if available is not None:
            room = int((SHARE * available - shared) // place) - 1
        return PoolPlan(max(1, min(MOST_SESSIONS, room)), size, frames, place, shared)
    needed = shared + (sessions + 1) * place
    if available is not None and needed > available:
        room = int((available - shared) // place) - 1
        mend = f"--sessions {room}" if room > 0 else "a smaller engine or --latent-size"
        raise ConfigError(
            f"--sessions {sessions}: needs {needed / 1e9:.1f} GB of memory ({place / 1e6:.1f} MB for each "
            f"and for clips), but {available / 1e9:.1f} GB are available; what fits: {mend}"
        )
    return PoolPlan(sessions, size, frames, place, shared)


class Pool:
    """The places of `plan`: sessions that share the engine of `base`. For use by one thread at a time."""

    def __init__(self, base: Session, plan: PoolPlan) -> None:
        self.plan, self.base = plan, base
        self._stack = ExitStack()
        self._free = [self._stack.enter_context(base.sibling()) for _ in range(plan.sessions)]
        self.clips = self._stack.enter_context(base.sibling())

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> Session | None:
        """A place, or None where all are taken; the same place is taken again first."""
        return self._free.pop() if self._free else None

    def give(self, session: Session) -> None:
        """Give a place back."""
        self._free.append(session)

    def warm_up(self, context: FloatArray) -> None:
        """Play a little in every place, so that caches are allocated and sizes of passes known.

        The first learns what passes cost here. Large networks play one block a place; others also meet what a
        new prompt does, before every block.
        """
        manifest = self.base.manifest
        cache = manifest.cache
        window = (cache.window_frames or cache.block_frames) // cache.block_frames
        blocks = 1 if is_large(manifest.model) else window + 2
        for i, session in enumerate((*self._free, self.clips)):
            self._play(session, context, blocks, None if i else LEARNING_MS)
            if blocks > 1:
                for recache in (False, True):
                    self._play(session, context, blocks, None, recache)
        _log.info("%d places of %d bytes", self.plan.sessions, self.plan.place_bytes)

    def _play(
        self,
        session: Session,
        context: FloatArray,
        blocks: int,
        deadline_ms: float | None,
        recache: bool | None = None,
    ) -> None:
        """The first blocks of a video, with a new prompt before each where `recache` is not None."""
        stream = session.generate_from(
            context,
            frames=self.plan.live_frames,
            latent_hw=self.plan.latent_hw,
            deadline_ms=deadline_ms,
            refresh_every=self.plan.refresh_every,
        )
        for _ in zip(range(blocks), stream, strict=False):
            if recache is not None:
                stream.switch_prompt(context, recache)
        stream.close()

    def close(self) -> None:
        """Release all places."""
        self._stack.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
