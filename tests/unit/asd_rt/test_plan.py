"""Fixed and listed plans."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.errors import ConfigError
from asd_rt.plan import FixedPlan, ListedPlan, count_blocks


def test_first_frame_enhancement() -> None:
    assert [FixedPlan(steps=1, first_steps=4).steps_of(i) for i in range(4)] == [4, 1, 1, 1]


def test_a_listed_plan_ends_in_its_last_number() -> None:
    assert [ListedPlan((4, 2, 1)).steps_of(i) for i in range(5)] == [4, 2, 1, 1, 1]


@pytest.mark.parametrize("steps", [0, 5, -1, 1.5, "4"])
def test_impossible_steps(steps) -> None:
    with pytest.raises(ConfigError, match="steps must be"):
        FixedPlan(steps=steps)
    with pytest.raises(ConfigError, match="first-steps must be"):
        FixedPlan(first_steps=steps)
    with pytest.raises(ConfigError, match="steps-per-block must be"):
        ListedPlan((1, steps))


def test_an_empty_list() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        ListedPlan(())


@given(frames=st.integers(1, 1000), block=st.integers(1, 9))
def test_blocks_cover_the_frames_and_no_more(frames, block) -> None:
    blocks = count_blocks(frames, block)
    assert (blocks - 1) * block < frames <= blocks * block


@pytest.mark.parametrize("frames", [0, -3, 1.0, "8", True, None])
def test_impossible_frames(frames) -> None:
    with pytest.raises(ConfigError, match="frames must be"):
        count_blocks(frames, 3)
