"""Threads of an engine that serves several videos: one a core, or all for each in turns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest

from asd_rt.engines import PACKAGED_DIR
from asd_rt.errors import BackendError, ConfigError
from asd_rt.machine import usable_cores
from asd_rt.manifest import read_manifest
from asd_rt.serve.opening import SMALL_BYTES, open_shared

PATH = PACKAGED_DIR / "asd_fp32.onnx"
MANIFEST = read_manifest(PATH)


def opened(videos: int = 8, manifest=MANIFEST, **given) -> tuple[str, int]:
    session, workers = open_shared(PATH, manifest, videos, **given)
    with session:
        return session.engine.device, workers


def test_a_small_network_has_a_video_a_core() -> None:
    assert opened(threads=3) == ("CPUExecutionProvider, 1 thread", 3)
    assert opened()[1] == min(8, usable_cores())
    assert opened(2, threads=5) == ("CPUExecutionProvider, 2 threads", 2), "a thread for each place"
    assert opened(1, threads=2) == ("CPUExecutionProvider, 2 threads", 1)
    assert opened(threads=4, workers=2) == ("CPUExecutionProvider, 2 threads", 2)
    assert opened(threads=4, workers=1) == ("CPUExecutionProvider, 4 threads", 1)


def test_a_large_one_takes_turns_unless_told_otherwise() -> None:
    weights = replace(MANIFEST.parts["weights"], bytes=SMALL_BYTES)
    large = replace(MANIFEST, parts={**MANIFEST.parts, "weights": weights})
    assert opened(manifest=large, threads=2) == ("CPUExecutionProvider, 2 threads", 1)
    assert opened(manifest=large, threads=2, workers=2)[1] == 2


def test_more_workers_than_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="--workers 3: there are 2 threads to share"):
        opened(threads=2, workers=3)


def test_where_one_video_fills_the_device_they_take_turns(toy) -> None:
    for manifest, device, where in (
        (replace(toy.manifest, runtime="openvino"), "cpu", "on OpenVINO"),
        (toy.manifest, "cuda", "on a card"),
        (replace(toy.manifest, backend="tensorrt_rtx"), "auto", "on a card"),
    ):
        with pytest.raises(ConfigError, match=rf"--workers 2: videos take turns {where}"):
            open_shared(toy.path, manifest, 8, workers=2, device=device)


def test_a_device_that_is_not_there_is_an_error(toy) -> None:
    with pytest.raises(BackendError):
        open_shared(toy.path, toy.manifest, 8, device="cuda")


def test_videos_made_side_by_side_are_those_made_alone() -> None:
    prompts = ["a red three moving right", "a blue seven moving left", "a green zero moving down"]
    session, _ = open_shared(PATH, MANIFEST, 3, threads=3)
    with session:
        places = [session.sibling() for _ in prompts]
        together = Barrier(len(prompts))

        def play(i: int, wait: bool) -> list[np.ndarray]:
            if wait:
                together.wait(10)
            blocks = places[i].generate(prompts[i], seed=i, frames=24, deadline_ms=1e6)
            return [block.frames for block in blocks]

        alone = [play(i, wait=False) for i in range(len(prompts))]
        with ThreadPoolExecutor(len(prompts)) as pool:
            beside = list(pool.map(play, range(len(prompts)), [True] * len(prompts)))
        for place in places:
            place.close()
    for one, other in zip(alone, beside, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
