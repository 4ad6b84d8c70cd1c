"""The one thread that runs the engine: videos take turns, block by block, whoever is due."""

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
    """A video, or whatever else needs the engine; all methods are called by the worker's thread."""

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

    def __init__(self) -> None:
        self._ring: deque[Turns] = deque()
        self._changed = Condition()
        self._stopping = False
        self._thread = Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin; what was added before is not forgotten."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def add(self, turns: Turns) -> None:
        """Let `turns` take part; from any thread."""
        with self._changed:
            self._ring.append(turns)
            self._changed.notify()

    def wake(self) -> None:
        """Something may be due that was not; from any thread."""
        with self._changed:
            self._changed.notify()

    def stop(self) -> None:
        """End all videos after the block that is being made, and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

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
            if not goes_on:
                with self._changed:
                    self._ring.remove(turns)
                turns.end(error)
        for turns in self._ring:
            turns.end(AsdError("the server stops"))

    def _next(self) -> Turns | None:
        """Wait until something is due, and put it at the ring's end; None when stopping."""
        with self._changed:
            while not self._stopping:
                now = monotonic()
                dues = [(turns.due(), turns) for turns in self._ring]
                soonest = min((due for due, _ in dues), default=math.inf)
                if soonest <= now:
                    last = soonest if soonest == -math.inf else now
                    turns = next(turns for due, turns in dues if due <= last)
                    self._ring.remove(turns)
                    self._ring.append(turns)
                    return turns
                self._changed.wait(None if soonest == math.inf else soonest - now)
        return None
