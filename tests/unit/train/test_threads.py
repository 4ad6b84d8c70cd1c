"""Threads of PyTorch: asked for, told by the environment, or found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from asd_rt.machine import usable_cores
from train.threads import use_threads


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("wanted", "told", "beside", "expected"),
    [
        (3, "2", 1, 3),
        (0, "2", 1, 2),
        (0, "2,1", 1, 2),
        (0, "", 1, usable_cores()),
        (0, "many", 1, usable_cores()),
        (0, "", 1000, 1),
        (0, "7", 2, max(1, usable_cores() // 2)),
        (3, "7", 2, 3),
    ],
)
def test_they_are_as_asked_told_or_found(
    wanted: int, told: str, beside: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert use_threads(wanted, beside) == expected == torch.get_num_threads()
