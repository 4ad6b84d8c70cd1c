"""Sessions over the toy engine: streaming, replay, and arguments refused before any work."""

from __future__ import annotations

import numpy as np
import pytest

import asd_rt
from asd_rt.config import CacheConfig
from asd_rt.errors import BackendError, ConfigError, EngineError, PromptError
from asd_rt.noise import gaussian
from asd_rt.plan import ListedPlan

PROMPT = "a red three moving right"


@pytest.fixture
def session(toy):
    with asd_rt.open(toy.path, threads=1) as opened:
        yield opened


def test_streams_blocks_of_frames(session) -> None:
    blocks = list(session.generate(PROMPT, seed=3, frames=5))
    assert [block.steps for block in blocks] == [4, 1, 1]
    assert [block.first_frame for block in blocks] == [0, 2, 4]
    for block in blocks:
        assert block.frames.shape == (2, 4, 2, 3)
        assert block.frames.dtype == np.uint8
        assert block.decode_ms > 0
        assert block.block_ms >= block.denoise_ms >= sum(block.pass_ms)


def test_same_seed_same_video(session, toy) -> None:
    first = [b.frames for b in session.generate(PROMPT, seed=3, frames=8)]
    list(session.generate("blue", seed=1, frames=2, steps=4))
    np.testing.assert_array_equal(first, [b.frames for b in session.generate(PROMPT, 3, 8)])
    with asd_rt.open(str(toy.path), threads=1) as other:
        np.testing.assert_array_equal(first, [b.frames for b in other.generate(PROMPT, 3, 8)])
    assert not np.array_equal(first, [b.frames for b in session.generate(PROMPT, 4, 8)])


def test_plans(session) -> None:
    def steps(**asked):
        return [b.steps for b in session.generate(PROMPT, frames=6, **asked)]

    assert steps() == [4, 1, 1]
    assert steps(steps=2) == [4, 2, 2]
    assert steps(steps=1, first_steps=1) == [1, 1, 1]
    assert steps(first_steps=3) == [3, 1, 1]


def test_default_length(session, own_toy) -> None:
    assert sum(len(b.frames) for b in session.generate(PROMPT)) == 48
    with asd_rt.open(own_toy.path) as short:
        assert sum(len(b.frames) for b in short.generate(PROMPT)) == 9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": "a purple cow"}, PromptError, "unknown words purple, cow"),
        ({"prompt": ""}, PromptError, "nothing to draw"),
        ({"frames": -1}, ConfigError, "frames must be"),
        ({"seed": -1}, ConfigError, "seed must be"),
        ({"steps": 5}, ConfigError, "steps must be 1, 2, 3 or 4"),
        ({"first_steps": 0}, ConfigError, "first-steps must be"),
    ],
)
def test_arguments_are_refused_at_once(session, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        session.generate(**({"prompt": PROMPT} | arguments))


def test_nothing_is_measured_before_a_block_is_asked_for(session, monkeypatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(
        "asd_rt.stream.joining_is_faster", lambda *_: measured.append("joining") or False
    )
    monkeypatch.setattr("asd_rt.stream.learn_costs", lambda *_: measured.append("costs"))
    blocks = session.generate("red three", frames=4, deadline_ms=1000.0)
    assert not measured
    assert next(blocks).deadline.budget_ms == 4000
    assert measured == ["joining", "costs"]


def test_replay_equals_generate(session) -> None:
    blocks = list(session.generate(PROMPT, seed=9, frames=6))
    noise = np.concatenate([gaussian((1, 2, 2, 4, 2), 9, b, 0) for b in range(3)], axis=1)
    result = session.replay(noise, session.context(PROMPT), seed=9)
    np.testing.assert_array_equal(
        result.latents, np.concatenate([b.latents for b in blocks], axis=1)
    )
    assert result.cache == {}


def test_replay_with_initial_latents_and_cache(session) -> None:
    noise = gaussian((2, 10, 2, 4, 2), 1, 0, 0)
    initial = gaussian((2, 2, 2, 4, 2), 2, 0, 0)
    context = gaussian((2, 3, 3), 3, 0, 0)
    renoise = {(1, 0): gaussian((2, 2, 2, 4, 2), 4, 0, 0)}
    plan = ListedPlan((2, 1))
    result = session.replay(noise, context, initial, renoise, plan, dump_cache=True)
    assert result.latents.shape == noise.shape
    np.testing.assert_array_equal(result.latents[:, :2], initial)
    assert [b.index for b in result.blocks] == [1, 2, 3, 4]
    assert sorted(result.cache) == [f"kv_cache.layer{i}.{kind}" for i in (0, 1) for kind in "kv"]
    assert all(array.shape == (2, 12, 2, 6) for array in result.cache.values())
    without = session.replay(noise, context, initial, None, plan)
    assert not np.array_equal(without.latents, result.latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": np.zeros((1, 4, 3, 4, 2), np.float32)}, "noise must be"),
        ({"noise": np.zeros((1, 4, 2, 4, 4), np.float32)}, "fixed to latents of 4x2, found 4x4"),
        ({"noise": np.zeros((1, 3, 2, 4, 2), np.float32)}, "whole number of blocks"),
        ({"context": np.zeros((1, 5, 3), np.float32)}, "context must be"),
        ({"context": np.zeros((1, 4, 9), np.float32)}, "context must be"),
        ({"initial": np.zeros(3, np.float32)}, "initial must be"),
        ({"renoise": {(7, 0): np.zeros((1, 2, 2, 4, 2), np.float32)}}, "can never be used"),
        ({"renoise": {(0, 3): np.zeros((1, 2, 2, 4, 2), np.float32)}}, "can never be used"),
        ({"seed": 1.5}, "seed must be"),
    ],
)
def test_replay_refuses(session, change, message) -> None:
    good = {
        "noise": np.zeros((1, 4, 2, 4, 2), np.float32),
        "context": np.zeros((1, 4, 3), np.float32),
    }
    with pytest.raises(ConfigError, match=message):
        session.replay(**(good | change))


def test_too_long_without_a_window(own_toy) -> None:
    with asd_rt.open(own_toy.path) as session, pytest.raises(ConfigError, match="--max-frames"):
        session.generate(PROMPT, frames=10)


def test_an_engine_without_a_fixed_size(own_toy, respell) -> None:
    engine = respell(own_toy, latent_hw=None)
    context = gaussian((1, 4, 3), 0, 0, 0)
    with asd_rt.open(engine.path) as session:
        with pytest.raises(ConfigError, match="fixes no latent size"):
            session.generate(PROMPT)
        (block,) = session.generate_from(context, frames=3, latent_hw=(6, 4))
        assert block.latents.shape == (1, 3, 2, 6, 4)
        with pytest.raises(ConfigError, match="even"):
            session.generate_from(context, latent_hw=(5, 4))


def test_an_engine_of_latents_only(own_toy, respell) -> None:
    parts = {k: v for k, v in own_toy.manifest.parts.items() if k not in ("text", "decoder")}
    engine = respell(own_toy, parts=parts, tokenizer=None, codec=None)
    with asd_rt.open(engine.path) as session:
        with pytest.raises(ConfigError, match="no decoder part"):
            session.generate(PROMPT)
        with pytest.raises(PromptError, match="takes no prompt"):
            session.context(PROMPT)
        (block,) = session.generate_from(gaussian((1, 4, 3), 0, 0, 0), frames=3)
        assert block.frames is None


def test_a_closed_session(toy) -> None:
    session = asd_rt.open(toy.path)
    session.close()
    session.close()
    with pytest.raises(BackendError, match="closed"):
        list(session.generate(PROMPT))


def test_open_finds_the_engine_in_engines(own_toy, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engines").mkdir()
    for path in own_toy.path.parent.glob("toy*"):
        path.rename(tmp_path / "engines" / path.name)
    with asd_rt.open() as session:
        assert session.engine.path.name == "toy_fp32.onnx"


def test_damaged_engines_do_not_open(own_toy) -> None:
    own_toy.path.write_bytes(own_toy.path.read_bytes() + b"x")
    with pytest.raises(EngineError, match="damaged denoiser"):
        asd_rt.open(own_toy.path)


def test_a_window_smaller_than_the_video_changes_it(own_toy, respell) -> None:
    def latents(cache: CacheConfig) -> np.ndarray:
        engine = respell(own_toy, cache=cache)
        with asd_rt.open(engine.path, threads=1) as session:
            return [b.latents for b in session.generate(PROMPT, frames=9)]

    full, wide = latents(CacheConfig(3)), latents(CacheConfig(3, window_frames=9))
    np.testing.assert_array_equal(full, wide)
    assert not np.array_equal(full, latents(CacheConfig(3, window_frames=6)))
