"""What can change while a video runs: its prompt, and what it remembers of itself.

Keys and values in the cache were computed under the prompt of their time. A new prompt may leave them so, or
have them computed anew (`recache`) from the clean latents of the frames that are still held. A refresh starts
the cache over, as if the video's first block were all that has been shown so far: what went wrong since is
forgotten, and the picture jumps. Where the prompt has changed since, that block shows the old one; then
nothing is kept, and the next block is the first of a new video.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asd_rt.config import CacheConfig
from asd_rt.errors import ConfigError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Switch:
    """A new prompt for the blocks to come.

    Attributes:
        context: its embedding, float32 [B, text_len, text_dim].
        recache: compute the cached frames anew under it.
    """

    context: FloatArray
    recache: bool


def check_refresh(every_blocks: object, cache: CacheConfig) -> int:
    """`every_blocks` (0 = never) as an int.

    Raises:
        ConfigError: it is no whole number >= 0, or the cache has no window.
    """
    if not isinstance(every_blocks, int) or isinstance(every_blocks, bool) or every_blocks < 0:
        raise ConfigError(f"refresh-every must be a whole number >= 0, found {every_blocks!r}")
    if every_blocks and not cache.window_frames:
        raise ConfigError(
            "refresh-every: this engine's cache has no window, so it holds the whole video; leave it out, or "
            "build the engine again with --window-frames"
        )
    return every_blocks


class CleanBlocks:
    """Clean latents of the first block and of all blocks with frames in the cache; by block, from 0."""

    __slots__ = ("_blocks", "_size")

    def __init__(self, block_frames: int) -> None:
        self._size = block_frames
        self._blocks: dict[int, FloatArray] = {}

    def add(self, block: int, latents: FloatArray, held: Iterable[int]) -> None:
        """Take `block` up, whose frames are among the `held` ones; forget those that have none there."""
        self._blocks[block] = latents
        wanted = {0, block, *(frame // self._size for frame in held)}
        for gone in self._blocks.keys() - wanted:
            del self._blocks[gone]

    def __getitem__(self, block: int) -> FloatArray:
        return self._blocks[block]

    def __len__(self) -> int:
        return len(self._blocks)
