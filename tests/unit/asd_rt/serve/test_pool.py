"""How many videos there is room for, and that places come back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import asd_rt
from asd_rt.config import CacheConfig
from asd_rt.engines import PACKAGED_DIR
from asd_rt.errors import ConfigError
from asd_rt.manifest import read_manifest
from asd_rt.serve.pool import MOST_SESSIONS, Pool, plan_pool

PATH = PACKAGED_DIR / "asd_fp32.onnx"
MANIFEST = read_manifest(PATH)


def test_as_many_as_fit_into_half_of_the_memory() -> None:
    roomy = plan_pool(PATH, MANIFEST, available=1 << 40)
    assert roomy.sessions == MOST_SESSIONS
    assert roomy.live_frames == 0, "a window makes endless videos"
    tight = 2 * (roomy.shared_bytes + 4 * roomy.place_bytes) + 2
    assert plan_pool(PATH, MANIFEST, available=tight).sessions == 3, "and one place for clips"
    assert plan_pool(PATH, MANIFEST, available=1).sessions == 1, "what is opened already can play"


def test_more_than_fit_are_refused_with_the_number_that_does() -> None:
    plan = plan_pool(PATH, MANIFEST, available=1 << 40)
    available = plan.shared_bytes + 11 * plan.place_bytes
    assert plan_pool(PATH, MANIFEST, 10, available=available).sessions == 10
    with pytest.raises(ConfigError, match=r"what fits: --sessions 10$"):
        plan_pool(PATH, MANIFEST, 11, available=available)


def test_sizes() -> None:
    free = replace(MANIFEST, latent_hw=None)
    assert plan_pool(PATH, free, latent_hw=(6, 10)).latent_hw == (6, 10)
    with pytest.raises(ConfigError, match="--latent-size HxW"):
        plan_pool(PATH, free)
    with pytest.raises(ConfigError, match="is fixed to 8x8"):
        plan_pool(PATH, MANIFEST, latent_hw=(6, 10))


def test_without_a_window_a_video_is_as_long_as_the_cache() -> None:
    short = replace(MANIFEST, cache=CacheConfig(block_frames=3, max_frames=20))
    assert plan_pool(PATH, short).live_frames == 18


def test_a_plan_serves_one() -> None:
    plan = replace(MANIFEST, backend="tensorrt_rtx")
    assert plan_pool(PATH, plan).sessions == 1
    with pytest.raises(ConfigError, match="one live video at a time"):
        plan_pool(PATH, plan, 2)


def test_places_are_taken_and_given_back(toy) -> None:
    with asd_rt.open(toy.path) as session:
        plan = replace(plan_pool(toy.path, toy.manifest), sessions=2)
        with Pool(session, plan) as pool:
            pool.warm_up(np.zeros((1, 1, toy.manifest.model.text_dim), np.float32))
            one, two = pool.take(), pool.take()
            assert one is not None and two is not None and one is not two
            assert pool.take() is None
            pool.give(one)
            assert (pool.free, pool.take()) == (1, one)
