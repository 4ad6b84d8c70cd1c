"""One block of a video, as it is handed out, with what it took; and a whole run of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asd_rt.deadline import BlockReport

FloatArray = NDArray[np.float32]


@dataclass(slots=True)
class Block:
    """One generated block.

    Attributes:
        index: counted from the first block of the video, initial ones included.
        first_frame: absolute index of its first latent frame.
        latents: clean latents, float32 [B, block_frames, C, h, w].
        steps: denoising passes that made it.
        pass_ms: duration of each denoising pass.
        joined: the first of them was also the cache pass of the block before.
        started_ms, ready_ms: when its denoising began and ended, since the loop began.
        cache_ms: duration of its cache pass; None until the consumer asked for the next block, and where that
            pass was joined with the next block's first or was not needed because the cache was computed anew.
        hidden_ms: of `cache_ms`, what was over before the block's frames were there: on a card both run side
            by side.
        switch_ms: duration of a new prompt or a refresh before it; None where there was neither.
        deadline: how it kept its deadline; None where there is none.
        frames: decoded video, uint8 [frames, rows, columns, 3]; None where nothing decodes.
        decode_ms: duration of decoding; None where nothing decodes.
    """

    index: int
    first_frame: int
    latents: FloatArray
    steps: int
    pass_ms: list[float]
    started_ms: float
    ready_ms: float
    joined: bool = False
    cache_ms: float | None = None
    hidden_ms: float = 0.0
    switch_ms: float | None = None
    deadline: BlockReport | None = None
    frames: NDArray[np.uint8] | None = None
    decode_ms: float | None = None

    @property
    def denoise_ms(self) -> float:
        """From the start of the block until its latents were there."""
        return self.ready_ms - self.started_ms

    @property
    def behind_ms(self) -> float:
        """What its cache pass takes of the next block's time."""
        return (self.cache_ms or 0.0) - self.hidden_ms

    @property
    def block_ms(self) -> float:
        """The whole block: a change before it, denoising, decoding and what of the cache pass came after, of
        those that ran.
        """
        return self.denoise_ms + (self.switch_ms or 0.0) + (self.decode_ms or 0.0) + self.behind_ms


@dataclass(frozen=True)
class Replay:
    """Result of `Session.replay`.

    Attributes:
        latents: float32 [B, F, C, h, w], initial frames included.
        blocks: the generated blocks.
        cache: `kv_cache.layer{i}.k` and `.v`, float32 [B, tokens, H, D], frames oldest first, as after the
            last cache pass; empty unless asked for.
    """

    latents: FloatArray
    blocks: list[Block]
    cache: dict[str, FloatArray]
