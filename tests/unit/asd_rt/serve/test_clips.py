"""Clips that are asked for: one that fails costs nobody else, and raw frames do not pile up."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import asd_rt
from asd_rt.serve.clips import ENCODING, OVER, Clip, ClipStore
from asd_rt.serve.http import ask_clip
from asd_rt.serve.ids import Ids
from asd_rt.serve.limits import Limits
from asd_rt.serve.metrics import Metrics
from asd_rt.serve.pool import plan_pool
from asd_rt.serve.protocol import MessageError, Settings
from asd_rt.serve.service import Service


class House:
    """A store over a real engine without a window, which holds 9 frames."""

    def __init__(self, toy: Any, session: Any, **limits: Any) -> None:
        self.session = session
        plan = replace(plan_pool(toy.path, toy.manifest), sessions=1)
        self.context = np.zeros((1, 1, toy.manifest.model.text_dim), np.float32)
        self.limits = replace(Limits(), **limits)
        self.metrics = Metrics(1, 1)
        self.store = ClipStore(session, plan, self.limits, Ids(), self.metrics)

    def ask(self, frames: int) -> Clip:
        return self.store.ask("a red three", self.context, frames, Settings())

    def work(self) -> None:
        """Take turns until there is nothing to do, as a worker does."""
        end = time.monotonic() + 30
        while (due := self.store.due()) != math.inf and time.monotonic() < end:
            if due <= time.monotonic():
                assert self.store.turn()
        assert self.store.due() == math.inf, "it does not come to rest"

    def finish(self, *clips: Clip) -> None:
        self.work()
        end = time.monotonic() + 30
        while any(clip.status not in OVER for clip in clips) and time.monotonic() < end:
            time.sleep(0.01)


@pytest.fixture
def house(own_toy: Any) -> Iterator[House]:
    with asd_rt.open(own_toy.path) as session:
        house = House(own_toy, session)
        yield house
        house.store.close()


def test_a_clip_that_cannot_begin_is_over_and_the_next_is_made(house: House) -> None:
    """It was "running" for ever, with a worker's thread at 100 %."""
    bad, good = house.ask(480), house.ask(9)
    house.finish(bad, good)
    assert bad.status == "failed" and "this engine's cache holds 9" in bad.error
    assert good.status == "done" and good.mp4


def test_what_is_no_error_of_ours_fails_one_clip(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [MemoryError()]
    begin = house.session.generate_from

    def generate(*args: Any, **more: Any) -> Any:
        if failures:
            raise failures.pop()
        return begin(*args, **more)

    monkeypatch.setattr(house.session, "generate_from", generate)
    bad, good = house.ask(3), house.ask(3)
    house.finish(bad, good)
    assert (bad.status, bad.error) == ("failed", "unexpected MemoryError")
    assert good.status == "done"


def test_a_cancelled_clip_is_not_made_and_is_counted(house: House) -> None:
    first, second = house.ask(9), house.ask(9)
    assert house.store.turn()
    for clip in (first, second):
        assert house.store.remove(clip.id) is clip
    house.work()
    assert [clip.status for clip in (first, second)] == ["cancelled"] * 2
    counted = house.metrics.clips.labels("cancelled")._value.get()
    assert counted == 2


def test_no_clip_is_begun_while_others_wait_for_the_encoder(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.store, "_encoding", ENCODING)
    house.ask(3)
    assert time.monotonic() < house.store.due() < math.inf
    monkeypatch.setattr(house.store, "_encoding", ENCODING - 1)
    assert house.store.due() == 0.0


def test_a_clip_larger_than_all_that_is_kept_fails_with_a_line(own_toy: Any) -> None:
    with asd_rt.open(own_toy.path) as session:
        house = House(own_toy, session, clip_bytes=100)
        clip = house.ask(9)
        house.finish(clip)
        assert clip.status == "failed" and "this server keeps 100" in clip.error
        assert house.store.get(clip.id) is clip
        house.store.close()


def test_a_clip_whose_raw_frames_take_too_much_is_refused(own_toy: Any) -> None:
    plan = replace(plan_pool(own_toy.path, own_toy.manifest), sessions=1)
    with asd_rt.open(own_toy.path) as session:
        limits = replace(Limits(), clip_raw_bytes=9 * session_frame_bytes(own_toy, plan))
        service = Service(session, plan, limits)
        service.check_clip(9)
        with pytest.raises(MessageError, match=r"^frames: 10 .* ask for at most 9$"):
            service.check_clip(10)
        with pytest.raises(MessageError, match=r"^frames: .*cache holds 9.*at most 9 frames"):
            asyncio.run(ask_clip(posted(service, b'{"prompt": "a red three", "frames": 10}')))
        service.close()


def posted(service: Service, body: bytes) -> Any:
    """A request with this body."""

    async def stream() -> Any:
        yield body

    app = SimpleNamespace(state=SimpleNamespace(service=service))
    return SimpleNamespace(app=app, headers={}, stream=stream)


def session_frame_bytes(toy: Any, plan: Any) -> int:
    """Bytes of a latent frame's raw frames: of the toy's codec as many pixels as latents, one to one."""
    from asd_rt.decoding import frame_size

    rows, columns = frame_size(toy.manifest, "decoder", plan.latent_hw)
    return 3 * rows * columns
