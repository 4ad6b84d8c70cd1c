"""Videos whose connection is lost: kept for a while, gone on with, and given up for others."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import asd_rt
from asd_rt.serve.ids import Ids
from asd_rt.serve.limits import Limits
from asd_rt.serve.live import LiveVideo
from asd_rt.serve.metrics import Metrics
from asd_rt.serve.outbox import Outbox
from asd_rt.serve.pool import Pool, plan_pool
from asd_rt.serve.protocol import Settings
from asd_rt.serve.seats import NoRoom, Seat, Seats
from asd_rt.serve.worker import Worker


class House:
    """Seats over a real pool and worker, as a service has them."""

    def __init__(self, toy: Any, session: Any, **limits: Any) -> None:
        self.limits = replace(Limits(), **limits)
        plan = replace(plan_pool(toy.path, toy.manifest), sessions=2)
        self.pool, self.worker, self.metrics = Pool(session, plan), Worker(), Metrics(2, 1)
        self.context = np.zeros((1, 1, toy.manifest.model.text_dim), np.float32)
        self.seats = Seats(2, self.pool.take, self.worker.wake, self.limits, Ids(), self.metrics)
        self.worker.start()

    async def sit(self, client: str) -> Seat:
        """A video of a client that is watched."""
        loop, watcher = asyncio.get_running_loop(), object()
        seat, place, left = await self.seats.claim(client, watcher, Outbox())

        def ended() -> None:
            self.pool.give(place)
            loop.call_soon_threadsafe(left)

        seat.video = LiveVideo(
            place,
            self.pool.plan,
            self.context,
            Settings(),
            None,
            lambda piece: loop.call_soon_threadsafe(seat.show, piece),
            lambda event: loop.call_soon_threadsafe(seat.tell, event),
            ended,
            lambda frames, fps: "",
            1 << 20,
            self.metrics,
        )
        self.worker.add(seat.video)
        return seat


@pytest.fixture
def live(toy: Any) -> Callable[..., None]:
    """Runs a test among seats."""

    def run(test: Callable[[House], Awaitable[None]], **limits: Any) -> None:
        with asd_rt.open(toy.path) as session:
            house = House(toy, session, **limits)

            async def whole() -> None:
                try:
                    await asyncio.wait_for(test(house), 30)
                finally:  # while there is a loop to tell
                    await asyncio.to_thread(house.worker.stop)

            asyncio.run(whole())
            house.pool.close()

    return run


def made_by(house: House) -> int:
    """Blocks of all videos so far."""
    found = re.search(rb'block_seconds_count{kind="live"} (\d+)', house.metrics.text())
    return int(found[1]) if found else 0


async def blocks(box: Outbox, count: int) -> list[int]:
    """Numbers of the next blocks, each acknowledged."""
    found: list[int] = []
    while len(found) < count:
        got = await asyncio.wait_for(box.next(lambda: 0.0), 10)
        if not isinstance(got, dict):
            box.ack(got.number, 0.0)
            found.append(got.number)
    return found


def test_who_comes_back_goes_on_where_it_was(live: Any) -> None:
    async def test(house: House) -> None:
        seat = await house.sit("a")
        await blocks(seat.outbox, 2)  # any: where it is busy, newer ones take older ones' places
        house.seats.leave(seat)
        assert house.seats.lost == [seat]
        while seat.video is not None and seat.video.due() < math.inf:
            await asyncio.sleep(0.01)  # until the block that was under way is made
        made = made_by(house)
        await asyncio.sleep(0.3)  # several blocks' time
        assert made_by(house) == made, "nothing was made for nobody"
        box, watcher = Outbox(), object()
        assert house.seats.go_on(seat.id, watcher, box) is seat
        assert seat.watcher is watcher and house.seats.lost == []
        first, second = await blocks(box, 2)
        assert made - 1 <= first < second, "the block that waited, or a newer one"
        assert house.seats.go_on("another", watcher, box) is None

    live(test)


def test_it_is_kept_for_a_while_only(live: Any) -> None:
    async def test(house: House) -> None:
        seat = await house.sit("a")
        house.seats.leave(seat)
        await asyncio.wait_for(seat.gone.wait(), 10)
        assert house.pool.free == 2
        assert house.seats.go_on(seat.id, object(), Outbox()) is None

    live(test, keep_s=0.2)


def test_a_lost_one_gives_way_to_who_needs_its_place(live: Any) -> None:
    async def test(house: House) -> None:
        first, second = await house.sit("a"), await house.sit("b")
        with pytest.raises(NoRoom, match="all 2 places are taken") as refused:
            await house.sit("c")
        assert refused.value.reason == "full"
        house.seats.leave(second)
        house.seats.leave(first)
        await house.sit("c")
        assert second.gone.is_set() and not first.gone.is_set(), "lost longest"
        assert house.seats.lost == [first]

    live(test)


def test_a_client_makes_room_for_itself_and_nobody_else(live: Any) -> None:
    async def test(house: House) -> None:
        own = await house.sit("a")
        with pytest.raises(NoRoom, match="1 live videos already") as refused:
            await house.sit("a")
        assert refused.value.reason == "client_sessions"
        other = await house.sit("b")
        house.seats.leave(other)
        with pytest.raises(NoRoom, match="1 live videos already"):
            await house.sit("a")
        house.seats.leave(own)
        again = await house.sit("a")
        assert own.gone.is_set() and not other.gone.is_set() and not again.gone.is_set()

    live(test, client_sessions=1)


def test_one_that_ends_is_not_gone_on_with(live: Any) -> None:
    async def test(house: House) -> None:
        seat = await house.sit("a")
        house.seats.end(seat)
        assert house.seats.go_on(seat.id, object(), Outbox()) is None
        house.seats.leave(seat)
        assert house.seats.lost == []
        await asyncio.wait_for(seat.gone.wait(), 10)
        assert house.pool.free == 2

    live(test)


def test_ids_name_their_replica() -> None:
    alone, one = Ids(), Ids("one")
    assert len({alone.new() for _ in range(100)}) == 100
    assert not alone.elsewhere(alone.new())
    assert one.new().startswith("one.")
    assert not one.elsewhere(one.new()) and one.elsewhere("other.id")
