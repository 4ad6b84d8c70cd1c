"""Freshness: a client is never more than two blocks behind what is generated, however slow it is.

A block counts until the client has acknowledged it, so what waits in sockets and in the client counts too. When
there are two, new ones are left out: a slow client loses frames, not time.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_QUEUED = 2  # blocks of one client, waiting or on their way


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A generated block on its way to a client.

    Attributes:
        number: counted from the connection's first block.
        prompt_id: of the prompt that it shows.
        frames: uint8 [frames, rows, columns, 3].
        header: what else the client is told.
    """

    number: int
    prompt_id: int
    frames: NDArray[np.uint8]
    header: dict[str, Any]


class Outbox:
    """Blocks and events of one client, in order; used by the event loop only.

    Attributes:
        dropped: frames that were left out.
    """

    def __init__(self) -> None:
        self._waiting: list[Piece] = []
        self._events: list[dict[str, Any]] = []
        self._sent: list[int] = []  # numbers of blocks that are not acknowledged
        self._ready = asyncio.Event()
        self.dropped = 0
        self.unacknowledged_since: float | None = None

    @property
    def queued(self) -> int:
        """Blocks that wait or are not acknowledged."""
        return len(self._waiting) + len(self._sent)

    def put(self, piece: Piece) -> int:
        """Take a block if there is room, in place of an older one that still waits if need be.

        Returns:
            frames that are left out for it.
        """
        left_out = [p for p in self._waiting if p.prompt_id != piece.prompt_id]  # stale
        self._waiting = [p for p in self._waiting if p.prompt_id == piece.prompt_id]
        if self.queued >= MAX_QUEUED:
            left_out.append(self._waiting.pop(0) if self._waiting else piece)
        if piece not in left_out:
            self._waiting.append(piece)
            self._ready.set()
        lost = sum(len(p.frames) for p in left_out)
        self.dropped += lost
        return lost

    def event(self, event: dict[str, Any]) -> None:
        """Take an event; events come before blocks."""
        self._events.append(event)
        self._ready.set()

    def ack(self, number: int, now: float) -> None:
        """The client shows block `number`: it and those before it count no longer."""
        self._sent = [n for n in self._sent if n > number]
        self.unacknowledged_since = now if self._sent else None

    async def next(self) -> Piece | dict[str, Any]:
        """The next thing to send; a block counts as sent from then on."""
        while not (self._events or self._waiting):
            self._ready.clear()
            await self._ready.wait()
        if self._events:
            return self._events.pop(0)
        piece = self._waiting.pop(0)
        self._sent.append(piece.number)
        if self.unacknowledged_since is None:
            self.unacknowledged_since = asyncio.get_running_loop().time()
        return piece
