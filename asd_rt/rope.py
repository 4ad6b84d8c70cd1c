"""Rotary position tables over (frame, height, width), for any frame index: length has no limit."""

from __future__ import annotations

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

    def angles(positions: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        return np.outer(positions, THETA ** (-np.arange(count, dtype=np.float64) / count))

    time = angles(np.asarray(frames, dtype=np.float64), channels - 2 * spatial)
    rows = angles(np.arange(height, dtype=np.float64), spatial)
    columns = angles(np.arange(width, dtype=np.float64), spatial)
    shape = (len(time), height, width)
    table = np.concatenate(
        [
            np.broadcast_to(time[:, None, None], (*shape, time.shape[1])),
            np.broadcast_to(rows[None, :, None], (*shape, spatial)),
            np.broadcast_to(columns[None, None, :], (*shape, spatial)),
        ],
        axis=-1,
    ).reshape(-1, channels)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)
