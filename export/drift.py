"""How an engine's latents part from float32 torch's, frame by frame, as a video goes on.

Twice: left to itself, where every error comes back through the cache and a video may become another one; and
with torch's latents written into the cache in place of its own, where only what the engine adds is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from asd_rt.arguments import make_plan
from asd_rt.backends.base import Engine, FloatArray
from asd_rt.frame_loop import Block, FrameLoop, Request
from asd_rt.manifest import Manifest
from asd_rt.planner import is_large, pass_parameters
from asd_rt.progress import Progress
from asd_rt.schedule import Schedule
from export.metrics import relative_l2, short
from export.reference import TorchEngine
from export.samples import latent_sizes, rollout_frames, sample_context
from train.checkpoint import Checkpoint

BUILD_BLOCKS = 24
BUILD_WORK = 1e12  # products of a number and a weight that a build spends on this: some seconds
EARLY_BLOCKS = 7
SEED = 200  # neither of calibration nor of the gate
VIDEOS = 2


@dataclass(frozen=True)
class Drift:
    """Relative L2 distance from float32 torch.

    Attributes:
        plan: {"steps": n, "first_steps": m} of the rollout.
        videos: played together.
        latent_hw: latent (rows, columns).
        block_frames: frames of a block.
        free: of each latent frame, all videos together.
        fed: of each latent frame, with torch's latents in the cache.
        early: of the first EARLY_BLOCKS blocks as a whole; None where there are fewer.
        whole: of all latents.
        last: of the last block.
    """

    plan: dict[str, int]
    videos: int
    latent_hw: tuple[int, int]
    block_frames: int
    free: list[float]
    fed: list[float]
    early: float | None
    whole: float
    last: float

    def summary(self) -> dict[str, Any]:
        """For manifests; three digits a figure."""
        return {
            "plan": self.plan,
            "videos": self.videos,
            "latents": list(self.latent_hw),
            "blocks": len(self.free) // self.block_frames,
            f"first_{EARLY_BLOCKS}_blocks": short(self.early),
            "all_blocks": short(self.whole),
            "last_block": short(self.last),
            "last_block_fed": short(max(self.fed[-self.block_frames :])),
        }

    def to_json(self) -> dict[str, Any]:
        """For reports: the summary, and every frame."""
        return {
            **self.summary(),
            "block_frames": self.block_frames,
            "frames": [short(x) for x in self.free],
            "frames_fed": [short(x) for x in self.fed],
        }


def build_blocks(manifest: Manifest) -> int:
    """Blocks of the rollout that a build plays: BUILD_BLOCKS where that is soon done."""
    if is_large(manifest.model):
        return rollout_frames(manifest) // manifest.cache.block_frames
    rows, columns = latent_sizes(manifest)[0]
    tokens = manifest.cache.block_frames * rows * columns // 4
    passes = 3 * (1 + manifest.default_plan["steps"]) * VIDEOS  # torch once, the engine twice
    affordable = int(BUILD_WORK // (pass_parameters(manifest.model) * tokens * passes))
    least = rollout_frames(manifest) // manifest.cache.block_frames
    return longest(manifest, max(least, min(BUILD_BLOCKS, affordable)))


def longest(manifest: Manifest, blocks: int) -> int:
    """`blocks`, or as many as the cache of `manifest` holds."""
    cache = manifest.cache
    if cache.window_frames or not cache.max_frames:
        return blocks
    return min(blocks, cache.max_frames // cache.block_frames)


def play(engine: Engine, request: Request) -> Iterator[Block]:
    """Blocks of a video, passes not joined; what is written over `Block.latents` goes into the cache."""
    manifest = engine.manifest
    schedule = Schedule(manifest.timestep_shift)
    return iter(
        FrameLoop(engine.denoiser, manifest.cache, schedule, request, manifest.model.text_len)
    )


def measure_drift(
    engine: Engine,
    reference: TorchEngine,
    checkpoint: Checkpoint,
    blocks: int,
    expected: FloatArray | None = None,
) -> tuple[Drift, FloatArray]:
    """Play the same noise by the engine's own plan through both.

    Args:
        engine: to be measured.
        reference: `checkpoint` in torch, with the engine's geometry.
        checkpoint: whose prompts are used where it has some.
        blocks: of the rollout; see `longest`.
        expected: torch's latents where they are known from another engine of the same geometry and plan.

    Returns:
        the figures, and torch's latents [videos, F, C, h, w].
    """
    manifest, size = engine.manifest, engine.manifest.cache.block_frames
    latent_hw = latent_sizes(manifest)[0]
    videos = 1 if is_large(manifest.model) else VIDEOS
    context = sample_context(checkpoint, videos, SEED).numpy()
    shape = (videos, blocks * size, manifest.model.in_dim, *latent_hw)
    request = Request(context, shape, make_plan(manifest, None, None), SEED)

    def run(one: Engine, fed: FloatArray | None, what: str) -> FloatArray:
        parts = []
        with Progress(what, blocks) as progress:
            for number, block in enumerate(play(one, request)):
                parts.append(block.latents.copy())
                if fed is not None:
                    block.latents[:] = fed[:, number * size : (number + 1) * size]
                progress.advance()
        return np.concatenate(parts, axis=1)

    if expected is None or expected.shape != shape:
        expected = run(reference, None, "float32 torch")
    free = run(engine, None, f"{manifest.name}, left to itself")
    fed = run(engine, expected, f"{manifest.name}, on torch's latents")
    early = slice(EARLY_BLOCKS * size)
    last = slice(-size, None)
    drift = Drift(
        plan=dict(manifest.default_plan),
        videos=videos,
        latent_hw=latent_hw,
        block_frames=size,
        free=_by_frame(free, expected),
        fed=_by_frame(fed, expected),
        early=relative_l2(free[:, early], expected[:, early]) if blocks >= EARLY_BLOCKS else None,
        whole=relative_l2(free, expected),
        last=relative_l2(free[:, last], expected[:, last]),
    )
    return drift, expected


def _by_frame(found: FloatArray, expected: FloatArray) -> list[float]:
    return [relative_l2(found[:, i], expected[:, i]) for i in range(found.shape[1])]
