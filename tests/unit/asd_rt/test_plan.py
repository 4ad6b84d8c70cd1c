"""Fixed and listed plans."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.arguments import frame_deadline_ms, make_plan
from asd_rt.costs import CostModel
from asd_rt.deadline import DeadlinePlan
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


@pytest.mark.parametrize("plan", [FixedPlan(2, 4), ListedPlan((4, 2))])
def test_plans_that_do_not_look_at_the_clock_take_what_all_are_told(plan) -> None:
    for block in range(3):
        plan.begin(block, 3 * block, joined=block > 0)
        assert plan.steps_of(block) == (4 if block == 0 else 2)
        plan.observe("pass", 3 * block, 1e9)
        plan.finish(block, 1e9)
        assert plan.report(block) is None


def test_with_a_deadline_steps_are_bounds(toy) -> None:
    costs = CostModel()
    plan = make_plan(toy.manifest, None, None, 40, costs)
    assert isinstance(plan, DeadlinePlan) and plan.costs is costs
    assert (plan.deadline_ms, plan.steps, plan.first_steps) == (40, 4, 4)
    plan = make_plan(toy.manifest, 2, 3, 40)
    assert (plan.steps, plan.first_steps) == (2, 3)
    assert isinstance(make_plan(toy.manifest, None, None), FixedPlan)
    with pytest.raises(ConfigError, match="deadline-ms must be"):
        make_plan(toy.manifest, None, None, float("nan"))
    assert frame_deadline_ms(toy.manifest, 16) == 125  # two frames a block


def test_an_empty_list() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        ListedPlan(())


@given(frames=st.integers(1, 1000), block=st.integers(1, 9))
def test_blocks_cover_the_frames_and_no_more(frames, block) -> None:
    blocks = count_blocks(frames, block)
    assert (blocks - 1) * block < frames <= blocks * block


def test_no_frames_mean_an_endless_video() -> None:
    assert count_blocks(0, 3) == 0


@pytest.mark.parametrize("frames", [-3, 1.0, "8", True, None])
def test_impossible_frames(frames) -> None:
    with pytest.raises(ConfigError, match="frames must be"):
        count_blocks(frames, 3)
