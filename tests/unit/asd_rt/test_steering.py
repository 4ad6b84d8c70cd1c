"""What changes while a video runs: prompts, refreshes, and the clean latents kept for both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asd_rt.config import CacheConfig
from asd_rt.errors import ConfigError
from asd_rt.frame_loop import FrameLoop, Request
from asd_rt.kv_cache import FrameSlots
from asd_rt.noise import gaussian
from asd_rt.plan import FixedPlan
from asd_rt.schedule import Schedule
from asd_rt.steering import CleanBlocks

OLD, NEW = gaussian((1, 3, 3), 1, 0, 0), gaussian((1, 4, 3), 2, 0, 0)
CACHE = CacheConfig(2, window_frames=6, sink_frames=1)


def loop(denoiser: Any, frames: int, join: bool = False, **fields: Any) -> FrameLoop:
    values = {"context": OLD, "plan": FixedPlan(1, 2), "shape": (1, frames, 2, 4, 2)} | fields
    return FrameLoop(denoiser, CACHE, Schedule(5.0), Request(**values), text_len=4, join=join)


@given(
    block=st.integers(1, 4),
    sink=st.integers(0, 6),
    more=st.integers(0, 12),
    blocks=st.integers(1, 30),
)
@settings(deadline=None)
def test_clean_blocks_are_bounded_and_serve_refills_and_refreshes(
    block, sink, more, blocks
) -> None:
    cache = CacheConfig(block, window_frames=sink + block + more, sink_frames=sink)
    slots, clean = FrameSlots(cache, 0), CleanBlocks(block)
    for number in range(blocks):
        slots.begin_block()
        slots.commit()
        clean.add(number, np.full(1, number, np.float32), slots.frames_in_order())
        assert len(clean) <= cache.window_frames // block + 4
    slots.begin_block()
    for refill in slots.refill():
        number = refill.frames.start // block
        assert clean[number] == number
    assert clean[0] == 0


@pytest.mark.parametrize("every", [-1, 1.5, True, "3"])
def test_impossible_refreshes(network, every) -> None:
    with pytest.raises(ConfigError, match="refresh-every must be"):
        loop(network, 4, refresh_every=every)


def test_a_switch_takes_effect_at_the_next_block_and_keeps_the_cache(network) -> None:
    plain = [b.latents for b in loop(network, 8)]
    video, blocks = loop(network, 8), []
    network.calls.clear()
    for block in video:
        blocks.append(block)
        if len(blocks) == 2:
            video.switch_prompt(OLD)  # of two before a block, the last counts
            video.switch_prompt(NEW)
    np.testing.assert_array_equal([b.latents for b in blocks[:2]], plain[:2])
    assert not np.allclose(blocks[2].latents, plain[2])
    assert [b.switch_ms is None for b in blocks] == [True, True, False, True]
    assert len(network.calls) == 8  # not a pass more than without
    assert blocks[2].block_ms >= blocks[2].switch_ms + blocks[2].denoise_ms


@pytest.mark.parametrize("join", [False, True])
def test_computing_anew_takes_a_pass_for_each_held_block_and_saves_one(network, join) -> None:
    blocks = []
    video = loop(network, 12, join, plan=FixedPlan(1, 1))
    for block in video:
        blocks.append(block)
        if len(blocks) == 5:
            network.calls.clear()
            video.switch_prompt(NEW, recache=True)
        if len(blocks) == 6:
            break
    # Frame 0 is a sink, 7 to 9 are the newest: of blocks 0 and 3 some frames leave again.
    assert network.calls == [
        (0.0, range(2), 0),
        (0.0, range(6, 8), 1),
        (0.0, range(8, 10), 2),
        (1000.0, range(10, 12), 4),
    ]
    assert blocks[4].cache_ms is None
    assert video.slots.frames_in_order() == [0, 7, 8, 9]


def test_a_switch_before_the_first_block(network) -> None:
    video = loop(network, 4)
    video.switch_prompt(NEW, recache=True)
    expected = [b.latents for b in loop(network, 4, context=NEW)]
    np.testing.assert_array_equal([b.latents for b in video], expected)


@pytest.mark.parametrize(
    "context", [np.zeros((2, 4, 3), np.float32), np.zeros((1, 5, 3), np.float32), np.zeros(3)]
)
def test_a_context_that_does_not_fit_changes_nothing(network, context) -> None:
    expected = [b.latents for b in loop(network, 6)]
    video = loop(network, 6)
    with pytest.raises(ConfigError, match="context"):
        video.switch_prompt(context)
    np.testing.assert_array_equal([b.latents for b in video], expected)


@pytest.mark.parametrize("join", [False, True])
def test_an_endless_video_equals_a_bounded_one_and_holds_as_much(network, join) -> None:
    expected = [b.latents for b in loop(network, 200, join)]
    found = []
    for block in loop(network, 0, join):
        found.append(block.latents)
        if len(found) == 100:
            break
    np.testing.assert_array_equal(found, expected)
    assert len(network.slots) == CACHE.window_frames + (CACHE.block_frames if join else 0)


@pytest.mark.parametrize("join", [False, True])
def test_a_refresh_restarts_positions_and_counts_on(network, join) -> None:
    blocks = list(loop(network, 24, join, plan=FixedPlan(1, 1), refresh_every=5))
    assert [b.first_frame for b in blocks] == list(range(0, 24, 2))
    assert [b.switch_ms is not None for b in blocks] == [i in (5, 10) for i in range(12)]
    frames = [call[1] for call in (*network.calls, *network.joined_calls)]
    assert max(f.stop for f in frames) == 12  # the first block, and five more


def test_a_refresh_goes_on_from_the_first_block_under_the_same_prompt(network) -> None:
    blocks = list(loop(network, 8, plan=FixedPlan(1, 1), refresh_every=3))
    expected = first_after(network, blocks[0].latents, context=OLD)
    np.testing.assert_array_equal(blocks[3].latents, expected)


def test_behind_a_new_prompt_a_refresh_begins_a_new_video_and_the_next_keeps_its_first_block(
    network,
) -> None:
    video, blocks = loop(network, 12, plan=FixedPlan(1, 3), refresh_every=2), []
    for block in video:
        blocks.append(block)
        if len(blocks) == 1:
            video.switch_prompt(NEW)
    assert [b.steps for b in blocks] == [3, 1, 3, 1, 1, 1]
    third = gaussian((1, 2, 2, 4, 2), 0, 2, 0)
    renoise = {(0, i): gaussian(third.shape, 0, 2, i + 1) for i in (0, 1)}
    (new,) = loop(network, 2, context=NEW, plan=FixedPlan(1, 3), noise=third, renoise=renoise)
    np.testing.assert_array_equal(blocks[2].latents, new.latents)
    expected = first_after(network, blocks[2].latents, block=4, context=NEW)
    np.testing.assert_array_equal(blocks[4].latents, expected)


def first_after(network, given, block: int = 3, **fields: Any) -> np.ndarray:
    """The block that follows `given` with the noise of `block`."""
    noise = np.concatenate([np.zeros_like(given), gaussian(given.shape, 0, block, 0)], axis=1)
    (found,) = loop(network, 4, plan=FixedPlan(1, 1), initial=given, noise=noise, **fields)
    return found.latents
