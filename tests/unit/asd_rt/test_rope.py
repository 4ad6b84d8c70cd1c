"""Rotary tables against the definition with complex numbers, at any frame index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.rope import rope_table


def by_definition(head_dim: int, frame: int, row: int, column: int) -> np.ndarray:
    """One token's rotations as complex numbers, channel by channel."""
    channels = head_dim // 2
    third = channels // 3
    counts = (channels - 2 * third, third, third)
    angles = [
        position * 10000.0 ** (-i / count)
        for position, count in zip((frame, row, column), counts, strict=True)
        for i in range(count)
    ]
    return np.exp(1j * np.array(angles))


@given(
    head_dim=st.sampled_from([6, 12, 16, 48, 128]),
    first=st.integers(0, 10**6),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
)
def test_equals_the_definition(head_dim, first, height, width) -> None:
    cos, sin = rope_table(head_dim, range(first, first + 2), height, width)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (2 * height * width, head_dim // 2)
    expected = [
        by_definition(head_dim, first + f, r, c)
        for f in range(2)
        for r in range(height)
        for c in range(width)
    ]
    np.testing.assert_allclose(cos + 1j * sin, expected, atol=2e-7)


def test_channels_of_the_large_model() -> None:
    cos, _ = rope_table(128, [5], 1, 1)
    assert np.flatnonzero(cos[0] != 1).max() == 21 - (
        cos[0, 21] == 1
    )  # 22 turn with time, rows and columns not


@pytest.mark.parametrize("frames", [range(3, 6), [3, 4, 5], np.array([3, 4, 5])])
def test_frames_may_be_any_sequence(frames) -> None:
    np.testing.assert_array_equal(
        rope_table(12, frames, 2, 2)[0], rope_table(12, range(3, 6), 2, 2)[0]
    )
