"""Turns: who is next, and that one failure is one's own."""

from __future__ import annotations

import math
import threading
import time

import pytest

from asd_rt.errors import AsdError
from asd_rt.serve.worker import Worker


class Counting:
    """Takes `turns` turns, noting each in a log."""

    def __init__(
        self, name: str, turns: int, log: list[str], failure: Exception | None = None
    ) -> None:
        self.name, self.left, self.log, self.failure = name, turns, log, failure
        self.at = 0.0
        self.ended = threading.Event()
        self.error: AsdError | None = None

    def due(self) -> float:
        return self.at

    def turn(self) -> bool:
        if self.failure is not None:
            raise self.failure
        self.log.append(self.name)
        self.left -= 1
        return self.left > 0

    def end(self, error: AsdError | None) -> None:
        self.error = error
        self.ended.set()


def test_those_that_are_due_take_turns() -> None:
    worker, log = Worker(), []
    videos = [Counting(name, 3, log) for name in "abc"]
    for video in videos:
        worker.add(video)
    worker.start()
    assert all(video.ended.wait(10) for video in videos)
    worker.stop()
    assert log == list("abcabcabc")


@pytest.mark.parametrize(
    ("failure", "said"),
    [(AsdError("no frames"), "no frames"), (ZeroDivisionError(), "unexpected ZeroDivisionError")],
)
def test_a_failure_ends_one_video_only(failure: Exception, said: str) -> None:
    worker, log = Worker(), []
    bad, good = Counting("bad", 3, log, failure), Counting("good", 3, log)
    worker.add(bad)
    worker.add(good)
    worker.start()
    assert bad.ended.wait(10)
    assert good.ended.wait(10)
    worker.stop()
    assert str(bad.error) == said
    assert (good.error, log) == (None, ["good"] * 3)


def test_one_that_is_not_due_waits_for_a_wake_up() -> None:
    worker, log = Worker(), []
    sleeper, other = Counting("sleeper", 1, log), Counting("other", 2, log)
    sleeper.at = math.inf
    worker.add(sleeper)
    worker.add(other)
    worker.start()
    assert other.ended.wait(10)
    assert not sleeper.ended.is_set()
    sleeper.at = time.monotonic()
    worker.wake()
    assert sleeper.ended.wait(10)
    worker.stop()


def test_who_wants_to_end_comes_first() -> None:
    worker, log = Worker(), []
    videos = [Counting(name, 1, log) for name in ("one", "two", "leaving")]
    videos[2].at = -math.inf
    for video in videos:
        worker.add(video)
    worker.start()
    assert all(video.ended.wait(10) for video in videos)
    worker.stop()
    assert log == ["leaving", "one", "two"]


def test_stopping_ends_all() -> None:
    worker = Worker()
    sleeper = Counting("sleeper", 1, [])
    sleeper.at = math.inf
    worker.add(sleeper)
    worker.start()
    worker.stop()
    assert not worker.is_alive
    assert str(sleeper.error) == "the server stops"


class Meeting(Counting):
    """Its turns begin together with another's, or not at all."""

    def __init__(self, name: str, turns: int, log: list[str], barrier: threading.Barrier) -> None:
        super().__init__(name, turns, log)
        self.barrier, self.running = barrier, threading.Lock()

    def turn(self) -> bool:
        assert self.running.acquire(blocking=False), "one thread at a time"
        try:
            self.barrier.wait(10)
            return super().turn()
        finally:
            self.running.release()


def test_side_by_side_each_thread_has_a_video_of_its_own() -> None:
    worker, log, barrier = Worker(2), [], threading.Barrier(2)
    videos = [Meeting(name, 20, log, barrier) for name in "ab"]
    for video in videos:
        worker.add(video)
    worker.start()
    assert all(video.ended.wait(10) for video in videos)
    worker.stop()
    assert [video.error for video in videos] == [None, None]
    assert log.count("a") == log.count("b") == 20


def test_more_threads_than_videos_wait_and_stop() -> None:
    worker, log = Worker(3), []
    sleeper, other = Counting("sleeper", 1, log), Counting("other", 5, log)
    sleeper.at = math.inf
    worker.add(sleeper)
    worker.start()
    worker.add(other)
    assert other.ended.wait(10)
    sleeper.at = time.monotonic()
    worker.wake()
    assert sleeper.ended.wait(10)
    late = Counting("late", 1, log)
    late.at = math.inf
    worker.add(late)
    worker.stop()
    assert not worker.is_alive
    assert str(late.error) == "the server stops"
