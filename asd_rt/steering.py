"""What can change while a video runs: its prompt, and what it remembers of itself.

Keys and values in the cache were computed under the prompt of their time. A new prompt may leave them so, or
have them computed anew (`recache`) from the clean latents of the frames that are still held. A refresh starts
the cache over: as if some of those blocks were all that has been shown so far, at positions that begin at 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from asd_rt.config import CacheConfig
from asd_rt.errors import ConfigError

FloatArray = NDArray[np.float32]
RefreshKind = Literal["window", "first", "last", "nothing"]


@dataclass(frozen=True, slots=True)
class Switch:
    """A new prompt for the blocks to come.

    Attributes:
        context: its embedding, float32 [B, text_len, text_dim].
        recache: compute the cached frames anew under it.
    """

    context: FloatArray
    recache: bool


@dataclass(frozen=True, slots=True)
class Refresh:
    """When the cache starts over, and with what.

    Attributes:
        every_blocks: generated blocks from one refresh to the next; 0 = never.
        kind: the blocks that are kept. "window": sinks and newest, all that the window holds, so that only
            positions change; "first": the video's first block; "last": its newest; "nothing": none, which
            begins a new video.
    """

    every_blocks: int = 0
    kind: RefreshKind = "window"

    def __post_init__(self) -> None:
        every = self.every_blocks
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise ConfigError(f"refresh-every must be a whole number >= 0, found {every!r}")
        if self.kind not in get_args(RefreshKind):
            raise ConfigError(
                f"refresh must be one of {', '.join(get_args(RefreshKind))}, found {self.kind!r}"
            )

    def check(self, cache: CacheConfig) -> None:
        """Raise ConfigError where a cache without a window would start over."""
        if self.every_blocks and not cache.window_frames:
            raise ConfigError(
                "refresh-every: this engine's cache has no window, so it holds the whole video; leave it "
                "out, or build the engine again with --window-frames"
            )

    def due(self, number: int) -> bool:
        """Whether the cache starts over before generated block `number`."""
        return bool(self.every_blocks and number and number % self.every_blocks == 0)


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

    def kept(self, kind: RefreshKind, cache: CacheConfig) -> list[FloatArray]:
        """The blocks that a refresh of `kind` keeps, oldest first."""
        order = sorted(self._blocks)
        if kind == "nothing" or not order:
            return []
        if kind == "first":
            return [self._blocks[order[0]]]
        if kind == "last":
            return [self._blocks[order[-1]]]
        sinks = -(-cache.sink_frames // self._size)
        room = (cache.window_frames - self._size) // self._size
        newest = order[max(sinks, len(order) - max(0, room - sinks)) :]
        return [self._blocks[block] for block in (order[:sinks] + newest)[:room]]
