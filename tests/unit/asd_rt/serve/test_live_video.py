"""A live video's turns: from an upload, with refreshes, and recordings that cannot be saved at once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asd_rt
from asd_rt.config import CacheConfig
from asd_rt.errors import AsdError
from asd_rt.manifest import write_manifest
from asd_rt.serve.live import LiveVideo
from asd_rt.serve.metrics import Metrics
from asd_rt.serve.outbox import Piece
from asd_rt.serve.pool import PoolPlan, plan_pool
from asd_rt.serve.protocol import Settings
from asd_rt.serve.uploads import fitted_count


class Watched:
    """A video, what it shows and what it tells."""

    def __init__(
        self,
        session: Any,
        plan: PoolPlan,
        start: Any = None,
        save: Any = None,
        record_bytes: int = 1 << 20,
    ) -> None:
        self.pieces: list[Piece] = []
        self.told: list[dict[str, Any]] = []
        self.context = np.zeros((1, 1, session.manifest.model.text_dim), np.float32)
        self.video = LiveVideo(
            session, plan, self.context, Settings(steps=1, first_steps=3), start, self.pieces.append,
            self.told.append, lambda: None, save or (lambda frames, fps: "id"), record_bytes,
            Metrics(1, 1),
        )  # fmt: skip

    def play(self, blocks: int) -> None:
        for _ in range(blocks):
            assert self.video.turn()


def test_an_upload_leaves_room_in_a_cache_without_a_window(stream_toy: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(stream_toy.path.parent, tmp_path / "toy")
    path = folder / stream_toy.path.name
    manifest = replace(stream_toy.manifest, cache=CacheConfig(block_frames=3, max_frames=9))
    write_manifest(path, manifest)
    with asd_rt.open(path) as session:
        plan = replace(plan_pool(path, manifest), sessions=1)
        rows, columns = frame_hw(manifest, plan)
        sent = np.zeros((48, rows, columns, 3), np.uint8)
        start = fitted_count(manifest, sent)
        watched = Watched(session, plan, start)
        watched.play(2)  # a block behind the start, and the end
        assert len(watched.pieces) == 1
        assert watched.told[-1]["type"] == "ended"


def frame_hw(manifest: Any, plan: PoolPlan) -> tuple[int, int]:
    from asd_rt.decoding import frame_size

    return frame_size(manifest, "encoder", plan.latent_hw)


def test_a_new_video_after_a_refresh_has_the_steps_of_a_first_block(toy: Any) -> None:
    with asd_rt.open(toy.path) as session:
        plan = replace(plan_pool(toy.path, toy.manifest), sessions=1, refresh_every=3)
        watched = Watched(session, plan)
        watched.play(2)
        watched.video.switch(watched.context, 1)
        watched.play(5)
        steps = [piece.header["steps"] for piece in watched.pieces]
        # Block 3 begins a new video, for the first block shows another prompt; block 6 goes back to it.
        assert steps == [3, 1, 1, 3, 1, 1, 1]


def test_a_recording_that_cannot_be_saved_yet_is_kept(toy: Any) -> None:
    full, saved = [True], []

    def save(frames: list[Any], fps: float) -> str:
        if full[0]:
            raise AsdError("too many recordings are being saved; try again later")
        saved.append(sum(map(len, frames)))
        return "id"

    with asd_rt.open(toy.path) as session:
        plan = replace(plan_pool(toy.path, toy.manifest), sessions=1)
        watched = Watched(session, plan, save=save)
        watched.video.record()
        watched.play(2)
        watched.video.save()
        watched.play(1)
        assert watched.told[-1]["message"].startswith("too many recordings")
        assert watched.told[-1]["code"] == "unsaved"
        full[0] = False
        watched.video.save()
        watched.play(1)
        assert watched.told[-1] == {"type": "recorded", "id": "id", "frames": 3 * 2}
        assert saved == [6]


def test_a_full_recording_waits_to_be_saved(toy: Any) -> None:
    full = [True]

    def save(frames: list[Any], fps: float) -> str:
        if full[0]:
            raise AsdError("too many recordings are being saved; try again later")
        return "id"

    with asd_rt.open(toy.path) as session:
        plan = replace(plan_pool(toy.path, toy.manifest), sessions=1)
        watched = Watched(session, plan)
        watched.play(1)
        block = watched.pieces[0].frames.nbytes
        watched = Watched(session, plan, save=save, record_bytes=2 * block)
        watched.video.record()
        watched.play(5)
        assert [event["type"] for event in watched.told] == ["error"], "said once, not every block"
        full[0] = False
        watched.video.save()
        watched.play(1)
        assert watched.told[-1] == {"type": "recorded", "id": "id", "frames": 2 * 2}


@pytest.mark.parametrize("most", [1, 2])
def test_uploads_are_cut_to_what_the_first_new_block_can_see(stream_toy: Any, most: int) -> None:
    cache = CacheConfig(block_frames=3, max_frames=3 * (most + 1))
    manifest = replace(stream_toy.manifest, cache=cache)
    frames = np.arange(48, dtype=np.uint8).reshape(48, 1, 1, 1)
    assert len(fitted_count(manifest, frames)) == 1 + 2 * (3 * most - 1)
