"""Live videos and who watches them: one whose connection is lost is kept for a while, to go on with.

It makes no blocks meanwhile, counts against all limits, and gives way to whoever needs its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from asd_rt.errors import AsdError
from asd_rt.serve.ids import Ids
from asd_rt.serve.limits import Limits, PerClient
from asd_rt.serve.live import LiveVideo
from asd_rt.serve.metrics import Metrics
from asd_rt.serve.outbox import Outbox, Piece
from asd_rt.session import Session


class NoRoom(AsdError):
    """A client cannot have another live video; `reason` is for the metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Seat:
    """A live video, and the connection that watches it.

    Attributes:
        id: by which a client finds it again.
        client: address that it counts for.
        outbox: of the connection; of nobody while that is lost.
        watcher: the connection; None while it is lost.
        video: what is watched.
        prompt, prompts: the newest prompt, and how many there were after the first.
        paused: whether the client wants it so.
        recording: whether the client has asked for it, and it has not ended.
        recorded: the newest clip of it, told again to who comes back.
        ending: it is over when the block that is being made is.
        gone: set when its place is free.
    """

    def __init__(
        self, seat_id: str, client: str, watcher: object, outbox: Outbox, metrics: Metrics
    ) -> None:
        self.id, self.client = seat_id, client
        self.outbox = outbox
        self.watcher: object | None = watcher
        self.video: LiveVideo | None = None
        self.prompt, self.prompts = "", 0
        self.paused = False
        self.recording = False
        self.recorded: str | None = None
        self.ending = False
        self.gone = asyncio.Event()
        self.timer: asyncio.TimerHandle | None = None
        self._metrics = metrics

    def show(self, piece: Piece) -> None:
        """Take a block; see `Outbox.put`."""
        lost = self.outbox.put(piece)
        if lost:
            self._metrics.dropped.inc(lost)

    def tell(self, event: dict[str, Any]) -> None:
        """Take an event."""
        if event["type"] == "recorded":
            self.recorded, self.recording = event["id"], False
        elif event.get("code") == "unsaved":
            self.recording = True
        self.outbox.event(event)


class Seats:
    """All live videos of a server; used by the event loop only."""

    def __init__(
        self,
        places: int,
        take: Callable[[], Session | None],
        wake: Callable[[], None],
        limits: Limits,
        ids: Ids,
        metrics: Metrics,
    ) -> None:
        """Videos in the `places` of a pool.

        Args:
            places: that there are.
            take: a free one, if there is one.
            wake: lets the engine's thread see who wants to end.
            limits, ids, metrics: of the server.
        """
        self._places, self._take, self._wake = places, take, wake
        self._limits, self._ids, self._metrics = limits, ids, metrics
        self._of_client = PerClient(limits.client_sessions)
        self._seats: dict[str, Seat] = {}

    @property
    def lost(self) -> list[Seat]:
        """Those whose connections are lost, in the order in which that happened."""
        return [seat for seat in self._seats.values() if seat.watcher is None]

    async def claim(
        self, client: str, watcher: object, outbox: Outbox
    ) -> tuple[Seat, Session, Callable[[], None]]:
        """A seat and a place for a new video; and what to call when it has ended and given the place back.

        Raises:
            NoRoom: the client has as many as it may, or all places are watched.
        """
        with ExitStack() as held:
            while not held.enter_context(self._of_client.hold(client)):
                if not await self._make_room(client):
                    most = self._limits.client_sessions
                    raise NoRoom(
                        "client_sessions",
                        f"your address has {most} live videos already; close one",
                    )
            while (place := self._take()) is None:
                if not await self._make_room():
                    raise NoRoom(
                        "full", f"all {self._places} places are taken; try again in a minute"
                    )
            seat = Seat(self._ids.new(), client, watcher, outbox, self._metrics)
            self._seats[seat.id] = seat
            release = held.pop_all().close

        def ended() -> None:
            release()
            self._forget(seat)

        return seat, place, ended

    async def _make_room(self, client: str | None = None) -> bool:
        """End the video that is lost longest, of `client` if that is given; False where there is none."""
        for seat in self.lost:
            if client in (None, seat.client):
                self.end(seat)
                await seat.gone.wait()
                return True
        return False

    def go_on(self, seat_id: str, watcher: object, outbox: Outbox) -> Seat | None:
        """Give `watcher` the video of this id; None where there is none (any more)."""
        seat = self._seats.get(seat_id)
        if seat is None or seat.video is None or seat.ending:
            return None
        self._stop_timer(seat)
        outbox.adopt(seat.outbox)
        seat.watcher, seat.outbox = watcher, outbox
        self._metrics.lost.set(len(self.lost))
        if not seat.paused:
            seat.video.resume()
            self._wake()
        return seat

    def leave(self, seat: Seat) -> None:
        """The connection is lost: keep the video for a while."""
        if seat.video is None or seat.ending:
            return
        outbox = Outbox()
        outbox.adopt(seat.outbox)
        seat.outbox, seat.watcher = outbox, None
        self._seats[seat.id] = self._seats.pop(seat.id)  # the newest is last
        seat.video.pause()
        self._wake()
        loop = asyncio.get_running_loop()
        seat.timer = loop.call_later(self._limits.keep_s, self.end, seat)
        self._metrics.lost.set(len(self.lost))

    def end(self, seat: Seat) -> None:
        """End the video, after the block that is being made."""
        self._stop_timer(seat)
        seat.ending = True
        if seat.video is not None:
            seat.video.close()
            self._wake()

    def _stop_timer(self, seat: Seat) -> None:
        if seat.timer is not None:
            seat.timer.cancel()
            seat.timer = None

    def _forget(self, seat: Seat) -> None:
        self._stop_timer(seat)
        seat.ending = True
        self._seats.pop(seat.id, None)
        seat.gone.set()
        self._metrics.lost.set(len(self.lost))
