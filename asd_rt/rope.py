"""Rotary position tables over (frame, height, width), for any frame index: length has no limit."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

THETA = 10000.0


def rope_table(
    head_dim: int, frames: NDArray[np.integer] | range, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of the rotary angles of a block of tokens.

    Of the c = head_dim / 2 complex channels c - 2*(c//3) turn with time, c//3 with height and
    c//3 with width, each axis with frequencies THETA ** (-i / channels of that axis).
    Angles are float64, so that frame 10**6 is as exact as frame 0. Source: Wan2.1 `rope_apply`.

    Args:
        head_dim: channels of one attention head (even).
        frames: absolute frame index of each frame of the block.
        height: token rows of a frame.
        width: token columns of a frame.

    Returns:
        (cos, sin), each float32 [len(frames) * height * width, head_dim / 2], tokens in
        frame-row-column order.
    """
    channels = head_dim // 2
    spatial = channels // 3
    turning = channels - 2 * spatial
    time = _angles(np.asarray(frames, dtype=np.float64), turning)[:, None]
    tables = np.empty((2, len(time), height * width, channels), np.float32)
    for table, function, fixed in zip(
        tables, (np.cos, np.sin), _spatial(spatial, height, width), strict=True
    ):
        table[..., :turning] = function(time)
        table[..., turning:] = fixed
    cos, sin = tables.reshape(2, -1, channels)
    return cos, sin


def _angles(positions: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    return np.outer(positions, THETA ** (-np.arange(count, dtype=np.float64) / count))


@lru_cache(maxsize=8)
def _spatial(count: int, height: int, width: int) -> tuple[NDArray[np.float64], ...]:
    """Cosines and sines of rows and columns, each [height * width, 2 * count]; the same for all frames."""
    rows = _angles(np.arange(height, dtype=np.float64), count).repeat(width, axis=0)
    columns = np.tile(_angles(np.arange(width, dtype=np.float64), count), (height, 1))
    table = np.concatenate([rows, columns], axis=1)
    return np.cos(table), np.sin(table)
