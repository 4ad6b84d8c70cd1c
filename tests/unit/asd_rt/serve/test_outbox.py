"""Freshness: how many blocks are on their way, and which are left out."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.serve.outbox import MAX_SENT, Outbox, Piece


def piece(number: int, frames: int = 3) -> Piece:
    return Piece(number, 0, np.zeros((frames, 2, 2, 3), np.uint8), {}, 0.0)


async def sent(box: Outbox) -> list[int]:
    """Numbers of the blocks that can be sent now."""
    found = []
    while True:
        try:
            got = await asyncio.wait_for(box.next(lambda: 1.0), 0.001)
        except TimeoutError:
            return found
        assert isinstance(got, Piece)
        found.append(got.number)


def test_two_are_sent_then_the_newest_waits() -> None:
    async def play() -> None:
        box = Outbox()
        assert [box.put(piece(i)) for i in range(1)] == [0]
        assert await sent(box) == [0]
        box.put(piece(1))
        assert await sent(box) == [1]
        assert [box.put(piece(i)) for i in (2, 3, 4)] == [0, 3, 3]
        assert await sent(box) == []
        assert box.dropped == 6
        box.ack(0, 2.0)
        assert await sent(box) == [4]
        assert box.unacknowledged_since == 2.0
        box.ack(4, 3.0)
        assert box.unacknowledged_since is None

    asyncio.run(play())


def test_events_come_before_blocks() -> None:
    async def play() -> None:
        box = Outbox()
        box.put(piece(0))
        box.event({"type": "prompt"})
        assert await box.next(lambda: 0.0) == {"type": "prompt"}
        assert await sent(box) == [0]

    asyncio.run(play())


def test_who_pauses_owes_nothing() -> None:
    async def play() -> None:
        box = Outbox()
        box.put(piece(0))
        await sent(box)
        box.forget()
        assert (box.on_their_way, box.unacknowledged_since) == (0, None)

    asyncio.run(play())


@given(st.lists(st.sampled_from(["put", "next", "ack"]), max_size=60))
def test_never_more_than_two_on_their_way_and_never_backwards(acts: list[str]) -> None:
    async def play() -> None:
        box, made, shown, lost = Outbox(), 0, [], 0
        for act in acts:
            if act == "put":
                lost += box.put(piece(made))
                made += 1
            elif act == "ack" and shown:
                box.ack(shown[-1], 0.0)
            elif act == "next":
                shown += await sent(box)
            assert box.on_their_way <= MAX_SENT
        assert shown == sorted(set(shown))
        assert lost == box.dropped
        waits = made * 3 - lost - 3 * len(shown)
        assert waits in (0, 3), "at most one block waits"

    asyncio.run(play())
