"""What a backend with streams of its own offers beside passes: a block queued whole, to be waited for once.

Decoding of a block and its cache pass need nothing of each other, so they run side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from asd_rt.backends.base import Denoiser, Engine, FloatArray
from asd_rt.decoding import Decoder
from asd_rt.schedule import Step


@dataclass(frozen=True, slots=True)
class CachePass:
    """A cache pass that has run.

    Attributes:
        ms: its duration.
        hidden_ms: how much of that was over before the block's frames were there.
    """

    ms: float
    hidden_ms: float


@dataclass(frozen=True, slots=True)
class QueuedBlock:
    """A block whose frames are there; durations are those of the device.

    Attributes:
        latents: clean, float32 [1, F, C, h, w]; the caller's own.
        frames: float32 [1, frames, 3, rows, columns] in -1..1; valid until the next block.
        pass_ms: duration of each denoising pass.
        denoise_ms: from the beginning of the first pass until the clean latents were there.
        decode_ms: from then until the frames were there, on the host.
        before: the cache pass of the block before; None where that had none.
    """

    latents: FloatArray
    frames: FloatArray
    pass_ms: list[float]
    denoise_ms: float
    decode_ms: float
    before: CachePass | None


class BlockQueue(Protocol):
    """Blocks of one video, queued whole. Between two of them the denoiser may be used in the usual way."""

    def run(
        self,
        noise: Sequence[FloatArray],
        steps: Sequence[Step],
        frames: range,
        past_frames: int,
        commits: bool,
    ) -> QueuedBlock:
        """Queue passes, decoding and the cache pass of a block, and wait for its frames alone.

        Args:
            noise: before each step, float32 [1, F, C, h, w].
            steps: of the block.
            frames: absolute indices of its F frames.
            past_frames: valid slots before it.
            commits: with its cache pass, which may run on when this returns.

        Raises:
            BackendError: something could not be queued, or failed, be it in the cache pass before.
        """

    def settle(self) -> None:
        """Wait for all passes that are queued."""


@runtime_checkable
class OverlappingEngine(Engine, Protocol):
    """An engine that can queue blocks whole."""

    def block_queue(self, decoder: Decoder, denoiser: Denoiser | None = None) -> BlockQueue | None:
        """The queue of a video that `decoder` decodes; None where this engine has none.

        Args:
            decoder: of this engine; it is used from now on by the queue, and goes on from where it is.
            denoiser: of this engine, where it is not the engine's own.
        """
