"""What all requests share: the engine's worker, the pool, clips, uploads, counters."""

from __future__ import annotations

import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from asd_rt.decoding import frame_size, temporal_factor
from asd_rt.errors import PromptError
from asd_rt.plan import count_blocks
from asd_rt.serve.clips import ClipStore
from asd_rt.serve.ids import Ids
from asd_rt.serve.limits import Limits, PerClient
from asd_rt.serve.metrics import Metrics
from asd_rt.serve.pool import Pool, PoolPlan
from asd_rt.serve.protocol import MessageError, Reader
from asd_rt.serve.seats import Seats
from asd_rt.serve.uploads import Uploads
from asd_rt.serve.worker import Worker
from asd_rt.session import FloatArray, Session

_log = logging.getLogger(__name__)


@dataclass
class Readiness:
    """Whether videos can be made."""

    warm: bool = False
    error: str = ""


class Service:
    """One engine being served."""

    def __init__(
        self,
        session: Session,
        plan: PoolPlan,
        limits: Limits,
        replica: str = "",
        workers: int = 1,
    ) -> None:
        """Allocates the pool; `start` runs the engine.

        Args:
            session: on the engine.
            plan: places for videos.
            limits: of what clients may.
            replica: this server's name among several.
            workers: videos made side by side (`asd_rt.serve.opening`).
        """
        manifest = session.manifest
        self.session, self.limits = session, limits
        self.frame_hw = frame_size(manifest, "decoder", plan.latent_hw)
        self.metrics = Metrics(plan.sessions, plan.place_bytes)
        self.pool = Pool(session, plan)
        self.pool_lock = Lock()
        self.worker = Worker(workers)
        self.ids = Ids(replica)
        self.clips = ClipStore(self.pool.clips, plan, limits, self.ids, self.metrics)
        self.uploads = Uploads(manifest, self.frame_hw, limits, self.ids)
        self.reader = Reader(limits.prompt_chars, limits.clip_frames)
        self.sockets = PerClient(limits.client_sockets)
        self.all_sockets = PerClient(limits.connections)  # uvicorn counts no WebSockets
        self.seats = Seats(
            plan.sessions, self._take, self.worker.wake, limits, self.ids, self.metrics
        )
        self.readiness = Readiness()
        # One thread: a text encoder is opened and released by it alone.
        self.prompts = ThreadPoolExecutor(1, "prompts")
        self.jpegs = ThreadPoolExecutor(1, "frames")

    def start(self) -> None:
        """Warm up, then let the worker run."""
        model = self.session.manifest.model
        import numpy as np

        self.pool.warm_up(np.zeros((1, 1, model.text_dim), np.float32))
        # What is there now stays. Python then looks through less, so garbage goes sooner and takes no time.
        gc.collect()
        gc.freeze()
        self.worker.add(self.clips)
        self.worker.start()
        self.readiness.warm = True

    def context(self, prompt: str) -> FloatArray:
        """Embedding of a prompt; for the prompts' thread.

        Raises:
            AsdError: the engine cannot read it.
        """
        try:
            return self.session.context(prompt)
        except PromptError as error:
            _log.info("refused: %s", error)
            raise

    def check_clip(self, latent_frames: int) -> None:
        """Refuse a clip of so many latent frames that its raw frames take more memory than they may.

        Raises:
            MessageError: with the number that does not.
        """
        manifest, most = self.session.manifest, self.limits.clip_raw_bytes
        rows, columns = self.frame_hw
        block = manifest.cache.block_frames
        made = temporal_factor(manifest) * 3 * rows * columns  # bytes of a latent frame's frames
        needed = count_blocks(latent_frames, block) * block * made
        if needed > most:
            raise MessageError(
                f"frames: {latent_frames} of {columns}x{rows} take {needed / 1e6:.0f} MB before they are "
                f"encoded, a clip may take {most / 1e6:.0f}; ask for at most {most // made // block * block}"
            )

    def _take(self) -> Session | None:
        """A place of the pool; None where all are taken."""
        with self.pool_lock:
            place = self.pool.take()
        if place is not None:
            self.metrics.sessions.inc()
        return place

    def give(self, session: Session) -> None:
        """Give a place back; by the worker's thread when its video has ended."""
        with self.pool_lock:
            self.pool.give(session)
        self.metrics.sessions.dec()

    def close(self) -> None:
        """End all videos and release the pool."""
        self.readiness.warm = False
        self.worker.stop()
        self.clips.close()
        self.prompts.shutdown(cancel_futures=True)
        self.jpegs.shutdown(cancel_futures=True)
        self.pool.close()
