"""Videos that a student makes of its own prompts, to learn what happens inside it.

They cover a cache that fills and rolls, every timestep of the plans with 1 to 4 steps and the pass at t = 0,
several prompts and seeds. One pass is in memory at a time; whoever watches keeps sums and maxima alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from asd_rt.backends.base import Denoiser, FloatArray
from asd_rt.manifest import Manifest
from asd_rt.plan import ListedPlan
from asd_rt.planner import is_large
from asd_rt.progress import Progress
from asd_rt.session import Session
from export.reference import TorchDenoiser, TorchEngine
from export.samples import latent_sizes, rollout_frames, sample_context, sample_noise
from train.checkpoint import Checkpoint

LARGEST = (16, 24)  # latents of a rollout: ranges need no more
SMALL = (4, 6)  # where a large network is run hundreds of times; see `export.samples`
PLANS = ((4, 1, 3, 2), (2, 4, 1, 3), (1, 3, 2, 4))
VIDEOS = 6  # of a small network; of a large one, one for each plan


def play_rollouts(
    checkpoint: Checkpoint,
    manifest: Manifest,
    denoiser: TorchDenoiser,
    what: str,
    seed: int,
    largest: tuple[int, int] = LARGEST,
) -> None:
    """Play all videos through `denoiser`; `what` is what the progress bar calls it.

    Args:
        checkpoint: of the student; its own prompts are used where it has some.
        manifest: geometry and schedule of the engine to be.
        denoiser: with the student's network, and maybe hooks that watch it.
        what: for the progress bar.
        seed: of noise and prompts; each video has another.
        largest: latents (rows, columns) that videos have at most.
    """
    noisy, clean = count_passes(manifest)
    with Progress(what, noisy + clean) as progress:
        counted = _Counted(denoiser, progress)
        for index in range(_videos(manifest)):
            _play(checkpoint, manifest, counted, index, seed + index, largest)


def count_passes(manifest: Manifest) -> tuple[int, int]:
    """Noisy and clean passes of all videos that `play_rollouts` plays."""
    blocks, videos = rollout_frames(manifest) // manifest.cache.block_frames, _videos(manifest)
    plans = [ListedPlan(PLANS[index % len(PLANS)]) for index in range(videos)]
    return sum(plan.steps_of(i) for plan in plans for i in range(blocks)), videos * blocks


def _videos(manifest: Manifest) -> int:
    return len(PLANS) if is_large(manifest.model) else VIDEOS


class _Counted:
    """A denoiser whose passes a progress bar counts."""

    def __init__(self, denoiser: TorchDenoiser, progress: Progress) -> None:
        self._denoiser, self._progress = denoiser, progress

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        flow = self._denoiser.denoise(latents, timestep, frames, past_frames)
        self._progress.advance()
        return flow


def _play(
    checkpoint: Checkpoint,
    manifest: Manifest,
    denoiser: _Counted,
    index: int,
    seed: int,
    largest: tuple[int, int],
) -> None:
    """Play video `index`: its own prompt, noise and plan."""
    sizes = latent_sizes(manifest)
    rows, columns = sizes[index % len(sizes)]
    size = min(rows, largest[0]), min(columns, largest[1])
    noise = sample_noise(manifest, size, 1, seed)
    engine = TorchEngine(checkpoint, replace(manifest, latent_hw=None), denoiser.model)
    engine.denoiser = cast(Denoiser, denoiser)
    context = sample_context(checkpoint, 1, seed).numpy()
    Session(engine, join=False).replay(
        noise, context, plan=ListedPlan(PLANS[index % len(PLANS)]), dump_cache=True
    )
