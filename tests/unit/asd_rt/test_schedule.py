"""The schedule's golden values, and that its formulas undo each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.errors import ConfigError
from asd_rt.schedule import STEP_LISTS, Schedule, add_noise, flow_to_x0

GOLDEN = sorted((Path(__file__).parents[2] / "data" / "golden").glob("*/trace.json"))


def test_warped_timesteps() -> None:
    steps = Schedule(5.0).steps(4)
    np.testing.assert_array_equal(
        np.float32([s.timestep for s in steps]), np.float32([1000, 937.5, 833.33331, 625])
    )
    np.testing.assert_allclose(
        [s.sigma * 1000 for s in steps], [s.timestep for s in steps], rtol=1e-6
    )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
def test_golden_step_lists(path: Path) -> None:
    trace = json.loads(path.read_text())
    schedule = Schedule(trace["timestep_shift"])
    for count, warped in trace["warped"].items():
        assert [s.timestep for s in schedule.steps(int(count))] == warped


def test_without_a_shift_steps_are_as_listed() -> None:
    assert [round(s.timestep) for s in Schedule(1.0).steps(3)] == list(STEP_LISTS[3])


@given(shift=st.floats(0.1, 20), value=st.integers(1, 1000))
def test_sigma_follows_the_formula(shift, value) -> None:
    u = value / 1000
    step = Schedule(shift).step_at(value)
    assert step.sigma == pytest.approx(shift * u / (1 + (shift - 1) * u), rel=1e-5)
    assert step.timestep == pytest.approx(1000 * step.sigma, rel=1e-6)


@given(sigma=st.floats(0, 1), seed=st.integers(0, 99))
def test_x0_comes_back_from_its_noised_form(sigma, seed) -> None:
    x0, noise = np.random.default_rng(seed).standard_normal((2, 1, 2, 3, 4, 4)).astype(np.float32)
    x_t = add_noise(x0, noise, sigma)
    assert x_t.dtype == np.float32
    back = flow_to_x0(noise - x0, x_t, sigma)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, x0, atol=3e-6)


@pytest.mark.parametrize("count", [0, 5, -1, 2.0, "2", True])
def test_only_one_to_four_steps(count) -> None:
    with pytest.raises(ConfigError, match="must be 1, 2, 3 or 4"):
        Schedule(5.0).steps(count)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_shift(shift) -> None:
    with pytest.raises(ConfigError, match="shift"):
        Schedule(shift)
