"""The threads that run the engine: videos take turns, block by block, whoever is due.

Where operators are too small to share among cores, each core makes blocks of a video of its own instead
(`asd_rt.serve.opening`).
"""

from __future__ import annotations

import logging
import math
from collections import deque
from threading import Condition, Thread
from time import monotonic
from typing import Protocol

from asd_rt.errors import AsdError

_log = logging.getLogger(__name__)


class Turns(Protocol):
    """A video, or whatever else needs the engine; its methods are called by one thread at a time."""

    def due(self) -> float:
        """When its next turn is due, in seconds of the monotonic clock.

        Infinity: not before a wake-up; minus infinity: it only wants to end, which others may wait for.
        """

    def turn(self) -> bool:
        """Do one block's work; False when it is the last turn."""

    def end(self, error: AsdError | None) -> None:
        """There are no more turns; `error`: because the last one failed."""


class Worker:
    """Runs turns until it is stopped; of those that are due, the one that has waited longest is next."""

    def __init__(self, threads: int = 1) -> None:
        """`threads`: turns that are taken side by side, of different videos."""
        self._ring: deque[Turns] = deque()  # but for those whose turn it is
        self._changed = Condition()
        self._stopping = False
        self._threads = [
            Thread(target=self._work, name=f"engine-{i}", daemon=True) for i in range(threads)
        ]

    def start(self) -> None:
        """Begin; what was added before is not forgotten."""
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def add(self, turns: Turns) -> None:
        """Let `turns` take part; from any thread."""
        with self._changed:
            self._ring.append(turns)
            self._changed.notify()

    def wake(self) -> None:
        """Something may be due that was not; from any thread."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """End all videos after the blocks that are being made, and the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._threads[0].ident is None:
            return
        for thread in self._threads:
            thread.join()
        while self._ring:
            self._ring.popleft().end(AsdError("the server stops"))

    def _work(self) -> None:
        while (turns := self._next()) is not None:
            error: AsdError | None = None
            try:
                goes_on = turns.turn()
            except AsdError as failure:
                goes_on, error = False, failure
            except Exception as failure:  # the others' videos must go on
                _log.exception("a video failed")
                goes_on, error = False, AsdError(f"unexpected {type(failure).__name__}")
            if goes_on:
                self.add(turns)
            else:
                turns.end(error)

    def _next(self) -> Turns | None:
        """Wait until something is due, and take it out of the ring; None when stopping."""
        with self._changed:
            while not self._stopping:
                now = monotonic()
                dues = [(turns.due(), turns) for turns in self._ring]
                soonest = min((due for due, _ in dues), default=math.inf)
                if soonest <= now:
                    last = soonest if soonest == -math.inf else now
                    turns = next(turns for due, turns in dues if due <= last)
                    self._ring.remove(turns)
                    return turns
                self._changed.wait(None if soonest == math.inf else soonest - now)
        return None
