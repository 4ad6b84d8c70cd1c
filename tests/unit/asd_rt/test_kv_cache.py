"""FrameSlots against a naive model that keeps a list of the frames a block may see."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asd_rt.config import CacheConfig
from asd_rt.errors import ConfigError
from asd_rt.kv_cache import FrameSlots, Move, attended_frames, joined_mask


@st.composite
def windows(draw: st.DrawFn) -> CacheConfig:
    block = draw(st.integers(1, 5))
    sink = draw(st.integers(0, 7))
    window = draw(st.integers(sink + block, sink + block + 13))
    return CacheConfig(block_frames=block, window_frames=window, sink_frames=sink)


def seen_by_block(cache: CacheConfig, block: int) -> list[int]:
    """Frames that a block attends to besides itself: sinks, then the newest that fit."""
    past = list(range(block * cache.block_frames))
    if not cache.window_frames:
        return past
    sinks, others = past[: cache.sink_frames], past[cache.sink_frames :]
    room = cache.window_frames - cache.block_frames - len(sinks)
    return sinks + (others[-room:] if room else [])


class Buffer:
    """A cache of one number a frame, moved and written as a denoiser would."""

    def __init__(self, capacity: int) -> None:
        self.frames: list[int | None] = [None] * capacity

    def move(self, moves: list[Move]) -> int:
        for m in moves:
            self.frames[m.target : m.target + m.frames] = self.frames[
                m.source : m.source + m.frames
            ]
        return sum(m.frames for m in moves)


@given(cache=windows(), blocks=st.integers(1, 40))
@settings(deadline=None)
def test_window_holds_sinks_and_newest_frames_in_a_contiguous_prefix(cache, blocks) -> None:
    slots = FrameSlots(cache, blocks * cache.block_frames)
    buffer = Buffer(slots.capacity_frames)
    assert slots.capacity_frames == cache.window_frames
    for block in range(blocks):
        moved = buffer.move(slots.begin_block())
        assert moved <= cache.block_frames
        assert sorted(buffer.frames[: slots.past_frames]) == seen_by_block(cache, block)
        assert slots.frames_in_order() == seen_by_block(cache, block)
        assert attended_frames(cache, block * cache.block_frames) == seen_by_block(cache, block)
        own = slots.block_range()
        assert own == range(block * cache.block_frames, (block + 1) * cache.block_frames)
        assert slots.past_frames + len(own) <= slots.capacity_frames
        buffer.frames[slots.past_frames : slots.past_frames + len(own)] = own
        slots.commit()
    assert [buffer.frames[i] for i in slots.slots_in_order()] == slots.frames_in_order()


@given(block=st.integers(1, 5), frames=st.integers(1, 60))
def test_without_a_window_everything_stays_where_it_is(block, frames) -> None:
    cache = CacheConfig(block_frames=block)
    slots = FrameSlots(cache, frames)
    blocks = -(-frames // block)
    assert slots.capacity_frames == blocks * block
    for i in range(blocks):
        assert slots.begin_block() == []
        assert slots.past_frames == i * block
        slots.commit()
    assert slots.slots_in_order() == list(range(blocks * block))


def test_neighbouring_frames_move_together() -> None:
    slots = FrameSlots(CacheConfig(block_frames=3, window_frames=9), 99)
    for _ in range(3):
        slots.begin_block()
        slots.commit()
    assert slots.begin_block() == [Move(source=6, target=0, frames=3)]


def test_longer_than_the_cache() -> None:
    with pytest.raises(ConfigError, match=r"holds 10.*at most 9 frames.*--max-frames 12"):
        FrameSlots(CacheConfig(block_frames=3, max_frames=10), 11)


def test_what_is_advised_works_behind_a_start() -> None:
    cache = CacheConfig(block_frames=3, max_frames=24)
    with pytest.raises(
        ConfigError, match=r"^24 frames .*behind the 3 of the start.*at most 21 fra"
    ):
        FrameSlots(cache, 27, 3)
    FrameSlots(cache, 21 + 3, 3)
    with pytest.raises(ConfigError, match=r"begin with a shorter clip"):
        FrameSlots(cache, 27, 24)


def test_going_on_past_the_end() -> None:
    slots = FrameSlots(CacheConfig(block_frames=2), 2)
    slots.begin_block()
    slots.commit()
    with pytest.raises(ConfigError, match="full at 2 frames"):
        slots.begin_block()


@given(cache=windows(), blocks=st.integers(1, 40))
@settings(deadline=None)
def test_leaving_slots_are_those_that_the_next_block_does_not_see(cache, blocks) -> None:
    slots = FrameSlots(cache, (blocks + 1) * cache.block_frames)
    for block in range(blocks):
        slots.begin_block()
        held = {*slots.frames_in_order(), *slots.block_range()}
        by_slot = dict(zip(slots.slots_in_order(), slots.frames_in_order(), strict=True))
        by_slot |= dict(enumerate(slots.block_range(), start=slots.past_frames))
        leaving = {by_slot[slot] for slot in slots.leaving_slots()}
        assert held - leaving == set(seen_by_block(cache, block + 1))
        slots.commit()


@given(block=st.integers(1, 3), past=st.integers(0, 6), tokens=st.integers(1, 3), draw=st.data())
def test_joined_mask_shows_each_block_what_it_would_see_alone(block, past, tokens, draw) -> None:
    hidden = draw.draw(st.sets(st.integers(0, past + block - 1)))
    mask = joined_mask(block, past, sorted(hidden), tokens)
    assert mask.shape == (2 * block * tokens, (past + 2 * block) * tokens)
    frames = mask[::tokens, ::tokens]
    assert (frames.repeat(tokens, 0).repeat(tokens, 1) == mask).all()
    assert (frames[:block] == [True] * (past + block) + [False] * block).all()
    seen = [slot not in hidden for slot in range(past + block)] + [True] * block
    assert (frames[block:] == seen).all()


@given(cache=windows(), blocks=st.integers(1, 30), windowed=st.booleans())
@settings(deadline=None)
def test_a_refill_leaves_the_held_frames_in_order(cache, blocks, windowed) -> None:
    if not windowed:
        cache = CacheConfig(cache.block_frames)
    slots = FrameSlots(cache, (blocks + 1) * cache.block_frames)
    buffer = Buffer(slots.capacity_frames)
    for _ in range(blocks):
        slots.begin_block()
        slots.commit()
    slots.begin_block()
    held = slots.frames_in_order()
    done: list[int] = []
    for refill in slots.refill():
        assert len(refill.frames) == cache.block_frames
        assert refill.frames.start % cache.block_frames == 0
        assert refill.past_frames == len(done)  # it sees the held frames before it, and no others
        end = refill.past_frames + len(refill.frames)
        assert end <= slots.capacity_frames
        buffer.frames[refill.past_frames : end] = refill.frames
        for move in refill.moves:
            assert move.frames == 1 and move.target < move.source
        buffer.move(refill.moves)
        done += [frame for frame in refill.frames if frame in held]
        assert buffer.frames[: len(done)] == done
    assert done == held == slots.frames_in_order()
    assert slots.slots_in_order() == list(range(len(held)))
    assert slots.begin_block() == [] and slots.past_frames == len(held)
    slots.commit()
    assert slots.frames_in_order()[-cache.block_frames :] == list(
        range(blocks * cache.block_frames, (blocks + 1) * cache.block_frames)
    )


def test_an_endless_video_needs_a_window() -> None:
    assert FrameSlots(CacheConfig(3, window_frames=9), 0).capacity_frames == 9
    with pytest.raises(ConfigError, match="no video can be endless"):
        FrameSlots(CacheConfig(3, max_frames=9), 0)
