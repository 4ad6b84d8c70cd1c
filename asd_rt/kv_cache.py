"""Where keys and values lie in the static KV cache: slots, window and sinks, counted in latent frames.

The buffers of a layer hold `capacity_frames` frames, token-major. A pass reads the first `past_frames`
of them and writes its own block's keys and values right behind: growing costs no copy at all. Attention does
not care for the order of keys (each carries its position from RoPE), so a full window is not rolled: the
newest block's frames move into the slots of the frames that leave, at most one block's worth of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asd_rt.config import CacheConfig
from asd_rt.errors import ConfigError


@dataclass(frozen=True)
class Move:
    """Copy `frames` frames of every layer's keys and values from slot `source` to slot `target`."""

    source: int
    target: int
    frames: int


@dataclass(frozen=True)
class Refill:
    """A pass that computes a block's keys and values anew, and what is to be done after it.

    Attributes:
        frames: absolute indices of the whole block.
        past_frames: slots that it attends to besides itself.
        moves: copies that leave only the held frames of the block, right behind the past.
    """

    frames: range
    past_frames: int
    moves: list[Move]


class FrameSlots:
    """Bookkeeping of one video's cache. Per block: `begin_block`, passes, `commit`.

    Attributes:
        capacity_frames: slots of a buffer.
        past_frames: valid prefix that the current block attends to besides itself.
    """

    __slots__ = (
        "_held",
        "_windowed",
        "block_frames",
        "capacity_frames",
        "committed_frames",
        "past_frames",
        "sink_frames",
    )

    def __init__(self, cache: CacheConfig, total_frames: int, given_frames: int = 0) -> None:
        """A cache for a video of `total_frames` latent frames (rounded up to whole blocks), 0 = endless.

        `given_frames` of them are those that it begins with, which is told apart in errors.

        Raises:
            ConfigError: the video is longer than a cache without a window can hold.
        """
        if not total_frames and not cache.window_frames:
            raise ConfigError(
                "this engine's cache has no window, so no video can be endless; ask for a number of frames, "
                "or build the engine again with --window-frames"
            )
        blocks = -(-total_frames // cache.block_frames)
        needed = blocks * cache.block_frames
        self._windowed = bool(cache.window_frames)
        if not self._windowed and cache.max_frames and needed > cache.max_frames:
            most = cache.max_frames - cache.max_frames % cache.block_frames - given_frames
            start = f" behind the {given_frames} of the start" if given_frames else ""
            mend = f"ask for at most {most} frames" if most > 0 else "begin with a shorter clip"
            raise ConfigError(
                f"{needed - given_frames} frames asked for{start}, but this engine's cache holds "
                f"{cache.max_frames} and has no window; {mend}, or build it again with "
                f"--max-frames {needed} or with --window-frames"
            )
        self.block_frames = cache.block_frames
        self.sink_frames = cache.sink_frames
        self.capacity_frames = cache.window_frames if self._windowed else needed
        self.committed_frames = 0
        self.past_frames = 0
        self._held: list[int] = []  # absolute frame in each slot

    def begin_block(self) -> list[Move]:
        """Make room for the next block; returns the copies to do before its first pass."""
        keep = self.capacity_frames - self.block_frames
        excess = len(self._held) - keep
        if excess <= 0:
            self.past_frames = len(self._held)
            return []
        if not self._windowed:
            raise ConfigError(
                f"the cache is full at {self.committed_frames} frames; ask for fewer frames, or build "
                "the engine with --window-frames"
            )
        leaving = sorted(frame for frame in self._held if frame >= self.sink_frames)[:excess]
        gone = set(leaving)
        free = [slot for slot in range(keep) if self._held[slot] in gone]
        moving = [slot for slot in range(keep, len(self._held)) if self._held[slot] not in gone]
        for source, target in zip(moving, free, strict=True):
            self._held[target] = self._held[source]
        del self._held[keep:]
        self.past_frames = keep
        return _merge(list(zip(moving, free, strict=True)))

    def leaving_slots(self) -> list[int]:
        """Slots whose frames the next block will not see: what `begin_block` frees after a `commit`.

        They may be slots of the current block itself, where the window is hardly larger than a block.
        """
        held = [*self._held, *self.block_range()]
        excess = len(held) + self.block_frames - self.capacity_frames
        if excess <= 0:
            return []
        others = [slot for slot, frame in enumerate(held) if frame >= self.sink_frames]
        return sorted(sorted(others, key=held.__getitem__)[:excess])

    def block_range(self) -> range:
        """Absolute frame indices of the current block."""
        return range(self.committed_frames, self.committed_frames + self.block_frames)

    def commit(self) -> None:
        """The current block's cache pass is done: its frames count as past from now on."""
        self._held.extend(self.block_range())
        self.committed_frames += self.block_frames

    def refill(self) -> list[Refill]:
        """Passes that compute all held frames anew; call it after `begin_block`.

        Afterwards the frames lie in order, oldest first. A block of which only some frames are held runs
        whole, as it did when they were made: no engine need take other sizes.
        """
        held, size, past = sorted(self._held), self.block_frames, 0
        refills = []
        for block in sorted({frame // size for frame in held}):
            frames = range(block * size, (block + 1) * size)
            kept = [i for i, frame in enumerate(frames) if frame in self._held]
            # One by one and upwards: source and target of a longer copy could overlap.
            moves = [Move(past + i, past + j, 1) for j, i in enumerate(kept) if i != j]
            refills.append(Refill(frames, past, moves))
            past += len(kept)
        self._held = held
        return refills

    def slots_in_order(self) -> list[int]:
        """Slots of all held frames, oldest frame first."""
        return sorted(range(len(self._held)), key=self._held.__getitem__)

    def frames_in_order(self) -> list[int]:
        """Absolute indices of all held frames, oldest first."""
        return sorted(self._held)


def _merge(pairs: list[tuple[int, int]]) -> list[Move]:
    """Join neighbouring one-frame copies into longer ones."""
    moves: list[Move] = []
    for source, target in pairs:
        last = moves[-1] if moves else None
        if last and source == last.source + last.frames and target == last.target + last.frames:
            moves[-1] = Move(last.source, last.target, last.frames + 1)
        else:
            moves.append(Move(source, target, 1))
    return moves


def joined_mask(
    block_frames: int, past_frames: int, hidden: Sequence[int], frame_tokens: int = 1
) -> NDArray[np.bool_]:
    """What the tokens of a joined pass see: bool [2 * block, past + 2 * block], in tokens, True = seen.

    The clean block sees the past and itself; the noisy one all but the `hidden` slots.
    """
    end = past_frames + block_frames
    mask = np.ones((2 * block_frames, end + block_frames), dtype=np.bool_)
    mask[:block_frames, end:] = False
    mask[block_frames:, list(hidden)] = False
    return mask.repeat(frame_tokens, axis=0).repeat(frame_tokens, axis=1)


def attended_frames(cache: CacheConfig, start: int) -> list[int]:
    """Past frames that the block starting at frame `start` attends to besides itself, oldest first.

    The sinks and the newest frames that fit into the window. `FrameSlots` keeps exactly these.
    """
    keep = cache.window_frames - cache.block_frames
    if not cache.window_frames or start <= keep:
        return list(range(start))
    return [*range(cache.sink_frames), *range(start - (keep - cache.sink_frames), start)]
