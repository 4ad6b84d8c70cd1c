"""A session's streams: later prompts, given frames to start from, and videos without an end."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import asd_rt
from asd_rt.errors import ConfigError, EngineError, PromptError
from asd_rt.noise import NoiseAhead, gaussian
from asd_rt.rope import rope_table
from tests.unit.asd_rt.conftest import whole_decode

RED, BLUE = "a red three moving right", "a blue 4 going up"


@pytest.fixture(scope="module")
def tiny():
    """The packaged engine, which has an encoder; blocks of 3, a window of 12."""
    engine = Path(asd_rt.__file__).parent / "engine" / "asd_fp32.onnx"
    with asd_rt.open(engine, threads=1) as opened:
        yield opened


@pytest.fixture
def session(toy):
    with asd_rt.open(toy.path, threads=1) as opened:
        yield opened


def latents(stream) -> list[np.ndarray]:
    return [block.latents for block in stream]


@pytest.mark.parametrize("join", [False, True])
def test_a_new_prompt_is_shown_from_the_next_block_on(toy, stream_toy, join) -> None:
    with asd_rt.open(stream_toy.path, threads=1) as session:
        old = latents(session.generate("red three", seed=3, frames=9))
        stream, blocks = session.generate("red three", seed=3, frames=9), []
        for block in stream:
            blocks.append(block)
            if block.index == 0:
                stream.switch_prompt("blue")
    np.testing.assert_array_equal(blocks[0].latents, old[0])
    for block, other in zip(blocks[1:], old[1:], strict=True):
        assert not np.allclose(block.latents, other)
    assert blocks[1].switch_ms > 0 and blocks[2].switch_ms is None
    assert [len(b.frames) for b in blocks] == [5, 6, 6]  # decoded as one video


def test_a_prompt_or_its_embedding(tiny) -> None:
    def play(prompt):
        stream = tiny.generate(RED, frames=6)
        first = next(stream)
        stream.switch_prompt(prompt, recache=True)
        return [first.latents, *latents(stream)]

    np.testing.assert_array_equal(play(BLUE), play(tiny.context(BLUE)))


def test_a_prompt_that_cannot_be_read_changes_nothing(session) -> None:
    expected = latents(session.generate("red", seed=2, frames=6))
    stream = session.generate("red", seed=2, frames=6)
    found = [next(stream).latents]
    with pytest.raises(PromptError, match="unknown word cow"):
        stream.switch_prompt("a cow")
    with pytest.raises(ConfigError, match="context must be"):
        stream.switch_prompt(np.zeros((1, 2, 9), np.float32), recache=True)
    np.testing.assert_array_equal([*found, *latents(stream)], expected)


def test_a_batch_switches_together(session) -> None:
    old, new = gaussian((2, 4, 3), 1, 0, 0), gaussian((2, 4, 3), 2, 0, 0)
    stream = session.generate_from(old, frames=6)
    next(stream)
    stream.switch_prompt(new)
    both = latents(stream)
    assert both[0].shape[0] == 2
    assert not np.allclose(both[0][0], both[0][1])


def test_a_closed_stream_has_no_more_blocks(session) -> None:
    stream = session.generate("red", frames=0)
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []


def test_deadlines_count_what_a_switch_costs(tiny) -> None:
    stream, blocks = tiny.generate(RED, frames=24, deadline_ms=1000.0), []
    for block in stream:
        blocks.append(block)
        if block.index == 4:
            stream.switch_prompt(BLUE, recache=True)
    switched = blocks[5]
    taken = switched.switch_ms + switched.denoise_ms + switched.decode_ms
    assert switched.deadline.taken_ms == pytest.approx(taken)
    assert switched.deadline.planned_ms > switched.switch_ms
    assert blocks[4].cache_ms is None and not switched.joined


def test_an_endless_stream_equals_a_bounded_one(session, own_toy) -> None:
    expected = latents(session.generate("red", seed=5, frames=60))
    stream = session.generate("red", seed=5, frames=0)
    np.testing.assert_array_equal([b.latents for b in islice(stream, 30)], expected)
    with asd_rt.open(own_toy.path) as bounded:
        with pytest.raises(ConfigError, match="no video can be endless"):
            bounded.generate("red", frames=0)
        with pytest.raises(ConfigError, match="refresh-every"):
            bounded.generate("red", refresh_every=2)


def test_positions_and_noise_go_on_far_beyond_any_video(tiny) -> None:
    """Noise of block 10**9, and angles of frame 3 * 10**9: those of near frames, turned."""
    far = 10**9
    shape = (1, 3, 24, 8, 8)
    drawn = NoiseAhead(shape, 7, 0, 2**62).draw(far, [0, 1])
    for step, noise in drawn.items():
        np.testing.assert_array_equal(noise, gaussian(shape, 7, far, step))
        assert abs(noise.std() - 1) < 0.05
    assert not np.array_equal(drawn[0], gaussian(shape, 7, far + 1, 0))
    near, there = (
        [a.astype(np.float64) for a in rope_table(40, range(s, s + 9), 4, 4)] for s in (0, 3 * far)
    )

    def turned(
        table, first, second
    ):  # cosine of the angle between two tokens, which attention sees
        cos, sin = table
        return cos[first] * cos[second] + sin[first] * sin[second]

    for first, second in ((0, 17), (3, 140), (16, 130)):
        np.testing.assert_allclose(
            turned(there, first, second), turned(near, first, second), atol=1e-6
        )


def clip(frames: int) -> np.ndarray:
    """A bright square that moves right, on the background of the tiny world."""
    pixels = np.full((frames, 32, 32, 3), (14, 16, 28), np.uint8)
    for i in range(frames):
        pixels[i, 10:22, 4 + i : 16 + i] = (255, 66, 61)
    return pixels


def test_a_video_goes_on_from_given_frames(tiny) -> None:
    given = clip(6)
    stream = tiny.generate(RED, seed=1, frames=6, start=given)
    assert stream.start_frames is None
    blocks = list(stream)
    assert [b.index for b in blocks] == [2, 3] and [b.first_frame for b in blocks] == [6, 9]
    assert stream.start_frames.shape == given.shape
    assert np.abs(stream.start_frames.astype(int) - given).mean() < 8
    initial = tiny.encode(given)
    noise = np.concatenate(
        [np.zeros_like(initial)] + [gaussian((1, 3, 24, 8, 8), 1, b, 0) for b in (2, 3)], axis=1
    )
    replayed = tiny.replay(noise, tiny.context(RED), initial, seed=1)
    np.testing.assert_allclose(
        np.concatenate([b.latents for b in blocks], axis=1), replayed.latents[:, 6:], atol=1e-4
    )


def test_a_decoder_that_remembers_has_seen_the_given_frames(stream_toy) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 4, 2, 3), dtype=np.uint8)
    with asd_rt.open(stream_toy.path, threads=1) as session:
        stream = session.generate("red", frames=6, start=pixels)
        blocks = list(stream)
        initial = session.encode(pixels)
    assert initial.shape[1] == 3
    whole = whole_decode(np.concatenate([initial, *(b.latents for b in blocks)], axis=1))
    frames = np.concatenate([stream.start_frames, *(b.frames for b in blocks)])
    wanted = np.moveaxis((whole[0] + 1) * 127.5, 1, -1)
    assert [len(b.frames) for b in blocks] == [6, 6]
    np.testing.assert_allclose(frames, wanted, atol=0.51)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (clip(4), "whole blocks: 3, 6, ... 3 more each time, found 4 frames"),
        (clip(3)[:, :16], "frames are 16x32, but asd_fp32 is fixed to 32x32"),
        (clip(3).astype(np.float32), "uint8"),
        (clip(3)[:0], "whole blocks"),
    ],
)
def test_impossible_starts(tiny, start, message) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.generate(RED, start=start)


def test_an_engine_without_an_encoder(session) -> None:
    with pytest.raises(EngineError, match="has no encoder part"):
        session.generate("red", start=np.zeros((2, 4, 2, 3), np.uint8))


def test_given_frames_count_in_a_cache_without_a_window(own_toy) -> None:
    initial = gaussian((1, 3, 2, 4, 2), 0, 0, 0)
    context = gaussian((1, 4, 3), 1, 0, 0)
    with asd_rt.open(own_toy.path, threads=1) as session:
        assert (
            len(list(session.generate_from(context, initial=initial))) == 2
        )  # of 9 frames, 6 are left
        with pytest.raises(ConfigError, match=r"^9 frames asked for behind the 3"):
            session.generate_from(context, frames=9, initial=initial)
        with pytest.raises(ConfigError, match="initial must be"):
            session.generate_from(context, frames=3, initial=initial[:, :2])
