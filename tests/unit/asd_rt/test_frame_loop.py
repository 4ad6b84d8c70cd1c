"""The frame loop over the toy network: order of passes, numerics against a naive loop, laziness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asd_rt.backends.base import open_backend
from asd_rt.config import CacheConfig
from asd_rt.errors import BackendError, ConfigError
from asd_rt.frame_loop import FrameLoop, Request, pad_context
from asd_rt.noise import gaussian
from asd_rt.plan import FixedPlan, ListedPlan
from asd_rt.schedule import Schedule, add_noise, flow_to_x0

SHIFT = Schedule(5.0)
CONTEXT = gaussian((1, 3, 3), 1, 0, 0)


def loop(
    denoiser: Any, cache: CacheConfig, frames: int, join: bool = False, **fields: Any
) -> FrameLoop:
    values = {"context": CONTEXT, "plan": FixedPlan(2, 4), "shape": (1, frames, 2, 4, 2)} | fields
    return FrameLoop(denoiser, cache, SHIFT, Request(**values), text_len=4, join=join)


def naive(
    network: Any, cache: CacheConfig, frames: int, plan: FixedPlan, seed: int
) -> list[np.ndarray]:
    """The loop spelled out, every pass with all the frames that it should see, oldest first."""
    size = cache.block_frames
    past: list[tuple[int, Any]] = []
    network.prepare(1, (4, 2), frames)
    network.set_prompt(pad_context(CONTEXT, 4))
    result = []
    for block in range(frames // size):
        keep = (cache.window_frames or frames) - size
        sinks = [p for p in past if p[0] < cache.sink_frames]
        others = [p for p in past if p[0] >= cache.sink_frames]
        room = keep - len(sinks)
        past = sinks + (others[-room:] if room else [])
        network.slots = [kv for _, kv in past] + [None] * size
        positions = range(block * size, (block + 1) * size)
        x = gaussian((1, size, 2, 4, 2), seed, block, 0)
        steps = SHIFT.steps(plan.steps_of(block))
        for i, step in enumerate(steps):
            x0 = flow_to_x0(network.denoise(x, step.timestep, positions, len(past)), x, step.sigma)
            if i + 1 < len(steps):
                x = add_noise(x0, gaussian(x.shape, seed, block, i + 1), steps[i + 1].sigma)
        network.denoise(x0, 0.0, positions, len(past))
        past += list(zip(positions, network.slots[len(past) :], strict=True))
        result.append(x0)
    return result


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(block_frames=2),
        CacheConfig(block_frames=2, window_frames=6, sink_frames=1),
        CacheConfig(block_frames=3, window_frames=7),
        CacheConfig(block_frames=1, window_frames=4, sink_frames=2),
        CacheConfig(block_frames=2, window_frames=2),
    ],
)
def test_equals_the_naive_loop_in_numpy_and_in_onnx_runtime(network, toy, cache) -> None:
    expected = naive(network, cache, 12, FixedPlan(2, 4), seed=7)
    ours = [b.latents for b in loop(network, cache, 12, seed=7)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    engine = open_backend(toy.path, threads=1)
    runtime = [b.latents for b in loop(engine.denoiser, cache, 12, seed=7)]
    np.testing.assert_allclose(runtime, expected, rtol=1e-4, atol=1e-5)
    engine.close()


def test_a_block_is_out_before_its_cache_pass_and_the_last_one_has_none(network) -> None:
    blocks = iter(loop(network, CacheConfig(block_frames=2), 6, plan=FixedPlan(1, 1)))
    first = next(blocks)
    assert [t for t, _, _ in network.calls] == [1000.0]
    assert first.cache_ms is None
    next(blocks)
    assert [t for t, _, _ in network.calls] == [1000.0, 0.0, 1000.0]
    assert first.cache_ms is not None and first.cache_ms >= 0
    last = list(blocks)[-1]
    assert [t for t, _, _ in network.calls] == [1000.0, 0.0, 1000.0, 0.0, 1000.0]
    assert last.cache_ms is None


def test_closing_skips_the_cache_pass(network) -> None:
    blocks = iter(loop(network, CacheConfig(block_frames=2), 6, plan=FixedPlan(1, 1)))
    next(blocks)
    blocks.close()
    assert len(network.calls) == 1


def test_the_last_cache_pass_runs_when_asked(network) -> None:
    video = loop(network, CacheConfig(block_frames=2), 4, plan=FixedPlan(1, 1), commit_last=True)
    assert all(block.cache_ms is not None for block in list(video))
    assert video.slots.frames_in_order() == [0, 1, 2, 3]
    assert network.calls[-1] == (0.0, range(2, 4), 2)


def test_steps_positions_and_past_of_every_pass(network) -> None:
    list(loop(network, CacheConfig(block_frames=2), 6, plan=ListedPlan((3, 1, 2))))
    warped = [round(t, 3) for t, _, _ in network.calls]
    assert warped == [1000.0, 937.5, 833.333, 0.0, 1000.0, 0.0, 1000.0, 833.333]
    assert [past for _, _, past in network.calls] == [0, 0, 0, 0, 2, 2, 4, 4]
    assert network.calls[-1][1] == range(4, 6)


def test_initial_latents_only_fill_the_cache(network) -> None:
    given = gaussian((1, 4, 2, 4, 2), 3, 9, 0)
    video = loop(network, CacheConfig(block_frames=2), 8, plan=FixedPlan(1, 2), initial=given)
    blocks = list(video)
    assert [t for t, _, _ in network.calls][:3] == [0.0, 0.0, 1000.0]
    assert [(b.index, b.first_frame, b.steps) for b in blocks] == [(2, 4, 2), (3, 6, 1)]


def test_given_noise_is_used_and_missing_noise_is_drawn(network) -> None:
    cache, shape = CacheConfig(block_frames=2), (1, 4, 2, 4, 2)
    drawn = [b.latents for b in loop(network, cache, 4, seed=3)]
    noise = np.concatenate([gaussian((1, 2, 2, 4, 2), 3, b, 0) for b in (0, 1)], axis=1)
    renoise = {(1, 0): gaussian((1, 2, 2, 4, 2), 3, 1, 1)}
    given = [b.latents for b in loop(network, cache, 4, seed=3, noise=noise, renoise=renoise)]
    np.testing.assert_array_equal(drawn, given)
    other = [b.latents for b in loop(network, cache, 4, seed=3, noise=np.zeros(shape, np.float32))]
    assert not np.array_equal(drawn, other)


def test_batch(network, toy) -> None:
    context = gaussian((2, 4, 3), 1, 1, 0)
    fields = {"context": context, "shape": (2, 4, 2, 4, 2), "plan": FixedPlan(2, 2)}
    engine = open_backend(toy.path, threads=1)
    runtime = [b.latents for b in loop(engine.denoiser, CacheConfig(block_frames=2), 4, **fields)]
    expected = [b.latents for b in loop(network, CacheConfig(block_frames=2), 4, **fields)]
    np.testing.assert_allclose(runtime, expected, rtol=1e-4, atol=1e-5)


def test_a_pass_that_does_not_fit_the_buffers_is_refused(toy) -> None:
    denoiser = open_backend(toy.path, threads=1).denoiser
    denoiser.prepare(1, (4, 2), 3)
    denoiser.set_prompt(pad_context(CONTEXT, 4))
    with pytest.raises(BackendError, match="does not fit"):
        denoiser.denoise(np.zeros((1, 2, 2, 4, 2), np.float32), 0.0, range(2, 4), 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (1, 5, 2, 4, 2)}, "whole number of blocks"),
        ({"context": np.zeros((2, 3, 3), np.float32)}, "context must be"),
        ({"context": np.zeros((1, 5, 3), np.float32)}, "at most 4"),
        ({"noise": np.zeros((1, 4, 2, 4, 4), np.float32)}, "noise must be"),
        ({"initial": np.zeros((1, 3, 2, 4, 2), np.float32)}, "initial must be"),
        ({"initial": np.zeros((1, 8, 2, 4, 2), np.float32)}, "initial must be"),
        ({"initial": np.zeros((4,), np.float32)}, "initial must be"),
        ({"renoise": {(0, 1): np.zeros((1, 4, 2, 4, 2), np.float32)}}, "renoise.block0.step1"),
    ],
)
def test_impossible_requests(network, fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        loop(network, CacheConfig(block_frames=2), 6, **fields)


def test_too_long_for_a_cache_without_a_window(network) -> None:
    with pytest.raises(ConfigError, match="--max-frames"):
        loop(network, CacheConfig(block_frames=2, max_frames=4), 6)


@pytest.mark.parametrize("commit_last", [False, True])
@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(block_frames=2),
        CacheConfig(block_frames=1, window_frames=4, sink_frames=2),
        CacheConfig(block_frames=3, window_frames=9, sink_frames=1),
        CacheConfig(block_frames=3, window_frames=7),
        CacheConfig(block_frames=3, window_frames=4),
        CacheConfig(block_frames=2, window_frames=2),
    ],
)
def test_joined_passes_give_the_same_video_and_cache(network, cache, commit_last) -> None:
    plan, frames = ListedPlan((4, 1, 2, 1, 3)), 50 * cache.block_frames
    apart = loop(network, cache, frames, plan=plan, seed=7, commit_last=commit_last)
    expected = [b.latents for b in apart]
    kept = network.slots[: len(apart.slots.frames_in_order())]
    calls = len(network.calls)
    network.calls.clear()
    joined = loop(network, cache, frames, plan=plan, seed=7, commit_last=commit_last, join=True)
    blocks = list(joined)
    np.testing.assert_allclose([b.latents for b in blocks], expected, rtol=1e-5, atol=1e-6)
    assert [b.joined for b in blocks] == [False] + [True] * 49
    assert len(network.joined_calls) == 49
    assert len(network.calls) + 2 * 49 == calls
    assert joined.slots.frames_in_order() == apart.slots.frames_in_order()
    assert joined.slots.slots_in_order() == apart.slots.slots_in_order()
    for slot, wanted in zip(network.slots, kept, strict=False):
        np.testing.assert_allclose(slot, wanted, rtol=1e-4, atol=1e-5)


def test_frames_leave_before_a_joined_pass(network) -> None:
    blocks = iter(loop(network, CacheConfig(block_frames=2), 6, plan=FixedPlan(1, 1), join=True))
    first = next(blocks)
    assert [t for t, _, _ in network.calls] == [1000.0]
    assert not network.joined_calls
    second = next(blocks)
    assert [t for t, _, _ in network.calls] == [1000.0]
    assert network.joined_calls == [(1000.0, range(4), 0, [])]
    assert (first.cache_ms, first.joined, second.joined) == (None, False, True)
