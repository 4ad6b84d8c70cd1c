"""What a cost model makes of single durations; whole streams are in test_deadline."""

from __future__ import annotations

import pytest

from asd_rt.costs import CostModel, Price


def test_one_hiccup_is_no_load_and_two_are() -> None:
    costs = CostModel()
    assert costs.estimate("pass", 0) is None
    for _ in range(20):
        for past in (0, 3, 6):
            costs.observe("pass", past, 10.0)
            costs.observe("cache", past, 9.0)
    costs.observe("pass", 6, 30.0)
    assert costs.estimate("pass", 3) == pytest.approx(10, rel=0.05)
    costs.observe("pass", 6, 30.0)
    assert [costs.estimate("pass", past) for past in (0, 3, 6, 99)] == pytest.approx(
        [30] * 4, rel=0.05
    )
    assert costs.estimate("cache", 0) == pytest.approx(27, rel=0.05)
    assert costs.estimate("joined", 0) is None
    for _ in range(3):
        costs.observe("pass", 0, 10.0)
    assert costs.estimate("pass", 3) == pytest.approx(10, rel=0.05)


def test_a_cold_first_pass_is_forgotten_at_once() -> None:
    costs = CostModel()
    for ms in (80.0, 10.0, 10.0):
        costs.observe("pass", 0, ms)
    assert costs.estimate("pass", 0) == pytest.approx(10)


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
def test_no_duration_is_no_observation(ms) -> None:
    costs = CostModel()
    costs.observe("pass", 0, ms)
    assert costs.estimate("pass", 0) is None


def test_a_new_length_keeps_what_it_costs_beside_others() -> None:
    costs = CostModel()
    for _ in range(10):
        costs.observe("pass", 0, 10.0)
        costs.observe("cache", 0, 8.0)
    costs.observe("pass", 3, 12.0)
    assert costs.estimate("pass", 3) == pytest.approx(12)
    assert costs.estimate("pass", 0) == pytest.approx(10)
    # Ten times as much cannot be the length: it is the machine.
    costs.observe("pass", 6, 120.0)
    costs.observe("pass", 6, 120.0)
    assert costs.estimate("pass", 6) == pytest.approx(120)
    assert costs.estimate("cache", 0) > 20


def test_a_wrong_share_is_put_right() -> None:
    costs = CostModel()
    costs.observe("pass", 0, 10.0)
    costs.observe("cache", 0, 30.0)  # a hiccup at first sight
    for _ in range(30):
        costs.observe("pass", 0, 10.0)
        costs.observe("cache", 0, 9.0)
    ratio = costs.estimate("cache", 0) / costs.estimate("pass", 0)
    assert ratio == pytest.approx(0.9, rel=0.1)


def test_doubt_comes_later_the_more_is_known() -> None:
    costs = CostModel()
    waits = []
    for known in (2, 100):
        for _ in range(known):
            costs.observe("pass", 0, 10.0)
            costs.observe("joined", 0, 16.0)
        assert not costs.is_doubtful(0)
        waits.append(0)
        while not costs.is_doubtful(0):
            costs.observe("joined", 0, 16.0)
            waits[-1] += 1
    assert waits[0] < 50 and waits[1] > 200


def test_price() -> None:
    price = Price(cache=8, step=10, rest=1, decode=2)
    assert [price.of(n) for n in (1, 2)] == [21, 32]
    assert [price.most(budget, 3) for budget in (20, 21, 40, 99)] == [0, 1, 2, 3]
    assert price.times(2).of(2) == 64
