"""A prompt that changes: ONNX Runtime against torch, and a cache computed anew against a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import asd_rt
from asd_rt.backends.base import open_backend
from asd_rt.config import CacheConfig
from asd_rt.errors import ConfigError
from asd_rt.frame_loop import FrameLoop, Request, pad_context
from asd_rt.noise import gaussian
from asd_rt.plan import FixedPlan
from asd_rt.schedule import Schedule
from export.reference import TorchEngine
from train.checkpoint import load_checkpoint
from train.model import KeyValue, make_rope

BLOCKS, AT = 8, 6  # of the video; the new prompt comes before block AT
HW, TOKENS = (8, 8), 16
SCHEDULE = Schedule(5.0)
LIMIT = 3e-4  # block sizes that the student was not trained on make more of a rounding than its own
GEOMETRIES = (
    CacheConfig(1, window_frames=5, sink_frames=1),
    CacheConfig(3, window_frames=12, sink_frames=3),
    CacheConfig(3, window_frames=11, sink_frames=1),
    CacheConfig(2),
)


@dataclass
class Engines:
    """The tiny student in ONNX Runtime and in torch, its cache as a test wants it."""

    runtime: Any
    torch: Any
    prompts: list[NDArray[Any]]
    cache: CacheConfig = GEOMETRIES[0]

    def loop(self, name: str, join: bool = False, **fields: Any) -> FrameLoop:
        shape = (1, BLOCKS * self.cache.block_frames, 24, *HW)
        values = {"context": self.prompts[0], "shape": shape, "plan": FixedPlan(2, 3), "seed": 4}
        request = Request(**(values | {"commit_last": True} | fields))
        denoiser = getattr(self, name).denoiser
        return FrameLoop(denoiser, self.cache, SCHEDULE, request, 8, join)

    def read(self, name: str, loop: FrameLoop) -> dict[str, NDArray[Any]]:
        """Keys and values that `loop` has left, oldest frame first."""
        slots, kept = loop.slots.slots_in_order(), {}
        for layer in range(6):
            keys, values = getattr(self, name).denoiser.read_cache(layer, slots)
            kept[f"k.{layer}"], kept[f"v.{layer}"] = keys, values
        return kept

    def run(
        self, name: str, join: bool, recache: bool, at: int = AT, **fields: Any
    ) -> tuple[list[NDArray[Any]], dict[str, NDArray[Any]]]:
        """Blocks of a video whose prompt changes before block `at`, and the cache behind it."""
        loop, blocks = self.loop(name, join, **fields), []
        for block in loop:
            blocks.append(block)
            if len(blocks) == at:
                loop.switch_prompt(self.prompts[1], recache)
        assert [b.switch_ms is not None for b in blocks] == [i == at for i in range(BLOCKS)]
        assert [b.joined for b in blocks] == [join and i not in (0, at) for i in range(BLOCKS)]
        assert blocks[-1].first_frame == (BLOCKS - 1) * self.cache.block_frames
        return [b.latents for b in blocks], self.read(name, loop)


@pytest.fixture(scope="module")
def opened() -> Iterator[Engines]:
    folder = Path(asd_rt.__file__).parent
    engine = open_backend(folder / "engine" / "asd_fp32.onnx", threads=1)
    checkpoint = load_checkpoint(folder.parent / "train" / "tiny_student")
    reference = TorchEngine(checkpoint, engine.manifest)
    with asd_rt.Session(engine) as session:
        prompts = [session.context(p) for p in ("a red three moving right", "a blue 4 going up")]
        yield Engines(engine, reference, prompts)


@pytest.fixture(params=GEOMETRIES, ids=lambda c: f"{c.block_frames}-{c.window_frames}")
def engines(opened: Engines, request: pytest.FixtureRequest) -> Engines:
    opened.cache = request.param
    return opened


@pytest.mark.parametrize("recache", [False, True])
def test_runtime_equals_torch_and_joined_equals_separate(
    engines: Engines, recache: bool, relative_l2: Callable[[Any, Any], float]
) -> None:
    expected, cache = engines.run("torch", join=False, recache=recache)
    for name, join in (("torch", True), ("runtime", False), ("runtime", True)):
        found, kept = engines.run(name, join=join, recache=recache)
        for i, (block, wanted) in enumerate(zip(found, expected, strict=True)):
            assert relative_l2(block, wanted) <= LIMIT, (name, join, i)
        for tensor, wanted in cache.items():
            assert relative_l2(kept[tensor], wanted) <= LIMIT, (name, join, tensor)


def test_only_computing_anew_reaches_the_past(
    engines: Engines, relative_l2: Callable[[Any, Any], float]
) -> None:
    kept, anew = (engines.run("runtime", join=False, recache=r)[0] for r in (False, True))
    for i in range(AT):
        np.testing.assert_array_equal(kept[i], anew[i])
    assert relative_l2(kept[AT], anew[AT]) > 1e-3


@pytest.mark.parametrize("name", ["torch", "runtime"])
def test_a_past_that_is_all_there_is_as_if_it_always_had_the_prompt(
    engines: Engines, name: str
) -> None:
    """Within the window the cache equals that of a run of the new prompt over the same clean latents."""
    cache = engines.cache
    at = (cache.window_frames or 12) // cache.block_frames - 1
    found, kept = engines.run(name, join=False, recache=True, at=at)
    initial = np.concatenate(found[:at], axis=1)
    loop = engines.loop(name, context=engines.prompts[1], initial=initial, plan=FixedPlan(2, 2))
    for block, wanted in zip(found[at:], loop, strict=True):
        np.testing.assert_array_equal(block, wanted.latents)
    for tensor, wanted in engines.read(name, loop).items():
        np.testing.assert_array_equal(kept[tensor], wanted)


@torch.no_grad()
def test_a_full_window_is_that_of_a_run_that_began_with_its_frames(
    engines: Engines, relative_l2: Callable[[Any, Any], float]
) -> None:
    """The blocks that are still held, oldest first, each seeing the held frames before it; frame by frame."""
    engine, cache = engines.torch, engines.cache
    found, _ = engines.run("runtime", join=False, recache=True)
    model, size = engine.denoiser.model, cache.block_frames
    prompt = model.embed_prompt(torch.from_numpy(pad_context(engines.prompts[1], 8)))
    start = AT * size
    room = (cache.window_frames or BLOCKS * size) - size - cache.sink_frames
    held = [f for f in range(start) if f < cache.sink_frames or f >= start - room]
    past: list[list[KeyValue]] = []  # by frame, then by layer

    def forward(x: NDArray[Any], t: float, block: int) -> tuple[NDArray[Any], list[KeyValue]]:
        layers = None
        if past:
            layers = [
                KeyValue(*(torch.cat([frame[i][j] for frame in past]) for j in (0, 1)))
                for i in range(6)
            ]
        rope = make_rope(
            model.config, range(block * size, (block + 1) * size), (HW[0] // 2, HW[1] // 2)
        )
        time = model.embed_time(torch.full((1, size), t))
        flow, new = model.denoise(torch.from_numpy(x.copy()), time, prompt, rope, layers)
        return flow.numpy(), new

    for block in range(AT):
        if any(f // size == block for f in held):
            _, new = forward(found[block], 0.0, block)
            for i in range(size):
                if block * size + i in held:
                    cut = slice(i * TOKENS, (i + 1) * TOKENS)
                    past.append([KeyValue(kv.k[cut], kv.v[cut]) for kv in new])
    assert len(past) == len(held)
    first, second = SCHEDULE.steps(2)
    x = gaussian(found[AT].shape, 4, AT, 0)
    x0 = x - first.sigma * forward(x, first.timestep, AT)[0]
    x = (1 - second.sigma) * x0 + second.sigma * gaussian(x.shape, 4, AT, 1)
    x = x.astype(np.float32)
    x0 = x - second.sigma * forward(x, second.timestep, AT)[0]
    assert relative_l2(found[AT], x0) <= 2e-5


@pytest.mark.parametrize("join", [False, True])
def test_a_refresh_goes_on_from_the_first_block(
    engines: Engines, join: bool, relative_l2: Callable[[Any, Any], float]
) -> None:
    """What comes after it equals a video that begins with that block."""
    if not engines.cache.window_frames:
        with pytest.raises(ConfigError, match="refresh-every"):
            engines.loop("runtime", refresh_every=6)
        return
    size, plan = engines.cache.block_frames, FixedPlan(1, 1)
    blocks = list(engines.loop("runtime", join, plan=plan, refresh_every=6))
    assert [b.first_frame for b in blocks] == [i * size for i in range(8)]
    first = blocks[0].latents
    noise = [np.zeros_like(first), *(gaussian(first.shape, 4, i, 0) for i in (6, 7))]
    shape = (1, 3 * size, *first.shape[2:])
    given = {"noise": np.concatenate(noise, axis=1), "shape": shape, "initial": first}
    expected = engines.loop("runtime", join, plan=plan, **given)
    for block, wanted in zip(blocks[6:], expected, strict=True):
        assert relative_l2(block.latents, wanted.latents) <= LIMIT
