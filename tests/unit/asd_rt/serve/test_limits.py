"""Rates and counts by client."""

from __future__ import annotations

from time import monotonic

from asd_rt.serve.limits import PerClient, Rate


def test_a_burst_then_a_rate() -> None:
    rate, now = Rate(2.0, 3), monotonic()
    assert [rate.take(now) for _ in range(4)] == [True, True, True, False]
    assert rate.take(now + 0.6)
    assert not rate.take(now + 0.7)
    assert [rate.take(now + 100) for _ in range(4)] == [True, True, True, False]


def test_each_client_has_its_own_count() -> None:
    held = PerClient(1)
    with held.hold("a") as first, held.hold("a") as second, held.hold("b") as other:
        assert (first, second, other) == (True, False, True)
    with held.hold("a") as again:
        assert again
