"""A block on a card: decoding beside the cache pass, and one wait. Streams run only what is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from asd_rt.backends.ort import open_engine as open_ort
from asd_rt.backends.tensorrt import open_engine
from asd_rt.block import Block
from asd_rt.errors import BackendError
from asd_rt.plan import ListedPlan
from asd_rt.session import Session
from tests.unit.asd_rt.fake_card import CODEC, PASSES, FakeCuda, LazyCuda, as_plan

Machine = Callable[..., FakeCuda]
CONTEXT = np.random.default_rng(0).standard_normal((1, 3, 3)).astype(np.float32)
OTHER = np.random.default_rng(1).standard_normal((1, 3, 3)).astype(np.float32)


def on_card(toy: Any, machine: Machine) -> tuple[Session, LazyCuda]:
    runtime = machine(LazyCuda)
    return Session(open_engine(toy.path, as_plan(toy.manifest))), runtime


def same_video(found: list[Block], expected: list[Block]) -> None:
    """But for the host's x0, which is computed in float64."""
    assert len(found) == len(expected) > 2
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.latents, other.latents, atol=2e-6, rtol=2e-6)
        assert one.frames.shape == other.frames.shape
        assert np.abs(one.frames.astype(int) - other.frames).max() <= 1
        assert (one.index, one.first_frame, one.steps) == (
            other.index,
            other.first_frame,
            other.steps,
        )


@pytest.mark.parametrize("name", ["toy", "stream_toy"])
def test_same_video_as_on_the_cpu(
    name: str, machine: Machine, request: pytest.FixtureRequest
) -> None:
    """More blocks than the window holds, of any number of steps, and another prompt on the way."""
    toy = request.getfixturevalue(name)
    session, runtime = on_card(toy, machine)
    cpu = Session(open_ort(toy.path, toy.manifest), join=False)
    plan, frames = ListedPlan((4, 1, 2, 3, 1)), 5 * toy.manifest.cache.block_frames

    def play(one: Session) -> list[Block]:
        stream, blocks = one.generate_from(CONTEXT, seed=3, frames=frames, plan=plan), []
        for block in stream:
            blocks.append(block)
            if len(blocks) == 2:
                stream.switch_prompt(OTHER)
            if len(blocks) == 4:
                stream.switch_prompt(CONTEXT, recache=True)
        return blocks

    expected = play(cpu)
    for _ in range(2):  # the second video reuses every buffer
        same_video(play(session), expected)
        held = len(runtime.memory)
    session.close()
    assert held and runtime.nothing_is_left()


def test_a_refresh_gives_the_same_video(toy: Any, machine: Machine) -> None:
    session, _ = on_card(toy, machine)
    cpu = Session(open_ort(toy.path, toy.manifest), join=False)
    settings = {"frames": 10, "steps": 2, "refresh_every": 2}
    videos = [list(one.generate_from(CONTEXT, **settings)) for one in (session, cpu)]
    same_video(*videos)
    session.close()


def test_one_wait_a_block(toy: Any, machine: Machine) -> None:
    """Decoding follows the last pass, the cache pass is queued before anybody waits, for the frames alone."""
    session, runtime = on_card(toy, machine)
    stream = session.generate_from(CONTEXT, frames=16, plan=ListedPlan((2,) * 8))
    for _ in range(6):  # every length is captured by then
        next(stream)
    runtime.calls.clear()
    next(stream)
    calls = [call for call in runtime.calls if call[0] != "HostToDevice"]
    queued = [
        call[:2] for call in calls if call[0] in ("launch", "run", "follow", "DeviceToHost", "wait")
    ]
    assert queued == [
        ("launch", PASSES),  # a pass,
        ("run", PASSES),  # the step behind it,
        ("launch", PASSES),
        ("run", PASSES),
        ("follow", CODEC),  # and the codec goes on:
        ("DeviceToHost", CODEC),  # latents,
        ("run", CODEC),
        ("DeviceToHost", CODEC),  # frames
        ("launch", PASSES),  # while the cache pass is on its way
        ("wait", None),
    ]
    assert not [call for call in calls if call[0] == "synchronize"]
    (follow,) = [call for call in calls if call[0] == "follow"]
    (wait,) = [call for call in calls if call[0] == "wait"]
    records = [(i, *call[1:]) for i, call in enumerate(calls) if call[0] == "record"]
    (clean,) = [i for i, stream, event in records if event == follow[2] and stream == PASSES]
    assert [call[0] for call in calls[:clean]].count("run") == 2, "decoding begins too early"
    assert [stream for _, stream, event in records if event == wait[2]] == [CODEC]
    session.close()


def test_the_cache_pass_runs_on_when_the_frames_are_out(toy: Any, machine: Machine) -> None:
    session, runtime = on_card(toy, machine)
    stream = session.generate_from(CONTEXT, frames=8, steps=1)
    for _ in range(3):
        next(stream)
        assert not runtime.queues[CODEC]
        assert [what for what, _ in runtime.queues[PASSES]].count("act") > 0
    next(stream)
    assert not [1 for what, _ in runtime.queues[PASSES] if what == "act"], "the last has none"
    session.close()


def test_what_a_block_took(toy: Any, machine: Machine) -> None:
    """Passes of 3 ms, steps of 3 ms too, decoding of 2 ms: 1 ms of each cache pass is left behind it."""
    session, runtime = on_card(toy, machine)
    runtime.takes = {PASSES: 3.0, CODEC: 2.0}
    finished = []

    class Noted(ListedPlan):
        def finish(self, block: int, taken_ms: float) -> None:
            finished.append(taken_ms)

    blocks = list(session.generate_from(CONTEXT, frames=8, plan=Noted((1,) * 4)))
    for block in blocks:
        assert block.decode_ms >= 2.0
    for block in blocks[2:]:  # whose timesteps are known
        assert block.denoise_ms == 6.0 and block.pass_ms == [3.0]
    for block in blocks[1:-1]:
        assert (block.cache_ms, block.hidden_ms, block.behind_ms) == (3.0, 2.0, 1.0)
        assert block.block_ms == block.denoise_ms + block.decode_ms + 1.0
    assert blocks[-1].cache_ms is None and blocks[-1].behind_ms == 0.0
    assert finished[2] == pytest.approx(1.0 + blocks[2].denoise_ms + blocks[2].decode_ms)
    session.close()


def test_a_deadline_is_kept_by_what_blocks_took(toy: Any, machine: Machine) -> None:
    session, runtime = on_card(toy, machine)
    blocks = list(session.generate_from(CONTEXT, frames=12, deadline_ms=60_000))
    assert all(block.deadline and not block.deadline.missed for block in blocks)
    runtime.takes = {PASSES: 40.0, CODEC: 2.0}
    blocks = list(session.generate_from(CONTEXT, frames=12, deadline_ms=20))
    assert all(block.deadline and block.deadline.missed for block in blocks[1:])
    assert blocks[-1].steps == 1
    session.close()


def test_a_video_may_end_between_two_blocks(toy: Any, machine: Machine) -> None:
    """Its cache pass is still under way; the next video is what it would be, and nothing stays."""
    session, runtime = on_card(toy, machine)
    expected = list(session.generate_from(CONTEXT, frames=8, seed=1))
    for seed in (2, 3):
        stream = session.generate_from(OTHER, frames=8, seed=seed)
        next(stream)
        next(stream)
        assert runtime.queues[PASSES]
        stream.close()
    found = list(session.generate_from(CONTEXT, frames=8, seed=1))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)
    stream = session.generate_from(OTHER, frames=8)
    next(stream)
    session.close()
    assert runtime.nothing_is_left()
    with pytest.raises(BackendError, match="closed"):
        next(stream)


def test_videos_in_turns(toy: Any, machine: Machine) -> None:
    session, runtime = on_card(toy, machine)
    siblings = [session.sibling(), session.sibling()]
    contexts = (CONTEXT, OTHER)
    alone = [list(session.generate_from(c, frames=8, steps=2)) for c in contexts]
    streams = [
        s.generate_from(c, frames=8, steps=2) for s, c in zip(siblings, contexts, strict=True)
    ]
    for number in range(4):
        for stream, expected in zip(streams, alone, strict=True):
            np.testing.assert_array_equal(next(stream).frames, expected[number].frames)
    for sibling in siblings:
        sibling.close()
    session.close()
    assert runtime.nothing_is_left()


def test_a_failed_cache_pass_is_told_at_the_next_wait(toy: Any, machine: Machine) -> None:
    session, runtime = on_card(toy, machine)
    stream = session.generate_from(CONTEXT, frames=12, steps=1)
    next(stream)
    next(stream)
    runtime.error_after = 0  # what runs next is the cache pass, which is under way
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress") as caught:
        next(stream)
    assert "\n" not in str(caught.value)
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        session.close()
    assert runtime.nothing_is_left()
