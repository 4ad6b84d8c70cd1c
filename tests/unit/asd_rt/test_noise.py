"""Noise is the same everywhere: frozen, keyed, and normal."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.errors import ConfigError
from asd_rt.noise import AHEAD_VALUES, MAX_SEED, NoiseAhead, check_seed, gaussian

KEYS = st.tuples(st.integers(0, MAX_SEED), st.integers(0, 2**40), st.integers(0, 255))


def test_frozen_values() -> None:
    """A video's seed is a promise: these bytes may never change."""
    values = gaussian((1, 3, 4, 5, 6), seed=1234, block=7, step=2)
    assert (
        hashlib.sha256(values.tobytes()).hexdigest()
        == "d65cb20e7281684528aa76fcbd9dc68b025dd21632f72505b446bf91db6d66b4"
    )


@given(key=KEYS, count=st.integers(1, 40))
def test_same_key_same_values(key, count) -> None:
    np.testing.assert_array_equal(gaussian((count,), *key), gaussian((count,), *key))


@given(one=KEYS, other=KEYS)
def test_other_key_other_values(one, other) -> None:
    same = np.array_equal(gaussian((16,), *one), gaussian((16,), *other))
    assert same == (one == other)


def test_moments() -> None:
    values = np.concatenate([gaussian((10_000,), 5, block, 0) for block in range(20)])
    assert values.dtype == np.float32
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 3) < 0.06
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, "1", True, None])
def test_impossible_seed(seed) -> None:
    with pytest.raises(ConfigError, match="seed must be"):
        check_seed(seed)


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=12),
)
def test_noise_drawn_ahead_is_that_of_each_step_alone(count, jumps) -> None:
    ahead, block = NoiseAhead((count,), 7, first=2, last=30), 2
    for jump, steps in jumps:
        drawn = ahead.draw(block, range(steps))
        assert list(drawn) == list(range(steps))
        for step, noise in drawn.items():
            np.testing.assert_array_equal(noise, gaussian((count,), 7, block, step))
        block += 1 + jump


def test_large_blocks_are_not_drawn_ahead() -> None:
    ahead = NoiseAhead((AHEAD_VALUES,), 7, first=0, last=9)
    ahead.draw(1, [0])
    assert not ahead._held
