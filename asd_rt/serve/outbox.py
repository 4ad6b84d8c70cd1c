"""Freshness: at most two blocks are on their way to a client, however slow it is.

A block counts until the client has acknowledged it, so what waits in sockets and in the client counts too.
Beside them only the newest block waits, and a newer one takes its place: a slow client loses frames, not
time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SENT = 2  # blocks of one client on their way


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A generated block on its way to a client.

    Attributes:
        number: counted from the connection's first block.
        prompt_id: of the prompt that it shows.
        frames: uint8 [frames, rows, columns, 3].
        header: what else the client is told.
        made_at: when it was made, in seconds of the monotonic clock.
    """

    number: int
    prompt_id: int
    frames: NDArray[np.uint8]
    header: dict[str, Any]
    made_at: float


class Outbox:
    """Blocks and events of one client, in order; used by the event loop only.

    Attributes:
        dropped: frames that were left out.
        unacknowledged_since: time of the event loop's clock from which on the client has left blocks without
            an acknowledgement; None where it has not.
    """

    def __init__(self) -> None:
        self._waiting: Piece | None = None
        self._events: deque[dict[str, Any]] = deque()
        self._sent: list[int] = []  # numbers of blocks that are not acknowledged
        self._ready = asyncio.Event()
        self.dropped = 0
        self.unacknowledged_since: float | None = None

    @property
    def on_their_way(self) -> int:
        """Blocks that are sent and not acknowledged."""
        return len(self._sent)

    def put(self, piece: Piece) -> int:
        """Take a block, in place of one that waits.

        Returns:
            frames that are left out for it.
        """
        lost = 0 if self._waiting is None else len(self._waiting.frames)
        self._waiting = piece
        self._ready.set()
        self.dropped += lost
        return lost

    def event(self, event: dict[str, Any]) -> None:
        """Take an event; events come before blocks."""
        self._events.append(event)
        self._ready.set()

    def ack(self, number: int, now: float) -> None:
        """The client shows block `number`: it and those before it count no longer."""
        before = len(self._sent)
        self._sent = [n for n in self._sent if n > number]
        if not self._sent:
            self.unacknowledged_since = None
        elif len(self._sent) < before:
            self.unacknowledged_since = now
        self._ready.set()

    def adopt(self, other: Outbox) -> None:
        """Go on from the box of another connection: with the block that waits there, but not its events."""
        self._waiting, other._waiting = other._waiting, None
        self.dropped += other.dropped
        self._ready.set()

    def forget(self) -> None:
        """The client has thrown away what it had, because it pauses."""
        self._sent, self.unacknowledged_since = [], None
        self._ready.set()

    async def next(self, now: Callable[[], float]) -> Piece | dict[str, Any]:
        """The next thing to send; a block counts as sent from then on. `now` is the loop's clock."""
        while True:
            if self._events:
                return self._events.popleft()
            if self._waiting is not None and len(self._sent) < MAX_SENT:
                piece, self._waiting = self._waiting, None
                self._sent.append(piece.number)
                if self.unacknowledged_since is None:
                    self.unacknowledged_since = now()
                return piece
            self._ready.clear()
            await self._ready.wait()
