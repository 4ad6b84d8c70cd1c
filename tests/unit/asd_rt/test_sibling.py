"""Sessions that share an engine: each plays its own video, whatever the others do between its blocks."""

from __future__ import annotations

import numpy as np
import pytest

import asd_rt
from asd_rt.errors import BackendError
from asd_rt.plan import ListedPlan
from asd_rt.session import Session


def test_videos_of_siblings_in_turns_are_those_played_alone(toy) -> None:
    prompts = ("red three", "blue 3 right")
    with asd_rt.open(toy.path, join=False) as session:
        alone = [
            [block.latents for block in session.generate(prompt, seed, frames=10)]
            for seed, prompt in enumerate(prompts)
        ]
        with session.sibling() as other:
            streams = [
                one.generate(prompt, seed, frames=10)
                for seed, (one, prompt) in enumerate(zip((session, other), prompts, strict=True))
            ]
            turns = [[block.latents for block in turn] for turn in zip(*streams, strict=True)]
        np.testing.assert_array_equal(turns, list(zip(*alone, strict=True)))
        assert len(list(session.generate("red", frames=2))) == 1, "closing one keeps the engine"


def test_what_passes_take_is_known_to_all(toy) -> None:
    with asd_rt.open(toy.path) as session, session.sibling() as other:
        assert other.costs is session.costs


def test_a_plan_can_be_given(toy) -> None:
    with asd_rt.open(toy.path) as session:
        blocks = session.generate_from(session.context("red"), frames=6, plan=ListedPlan((2, 3)))
        assert [block.steps for block in blocks] == [2, 3, 3]


def test_an_engine_of_one_video_has_no_siblings(toy, network) -> None:
    class Plain:
        path, denoiser = toy.path, network

    with pytest.raises(BackendError, match="one video at a time"):
        Session(Plain()).sibling()
