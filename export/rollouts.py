"""Videos that a student makes of its own prompts, to learn what happens inside it.

They cover a cache that fills and rolls, every timestep of the plans with 1 to 4 steps and the pass at t = 0,
several prompts and seeds. One pass is in memory at a time; whoever watches keeps sums and maxima alone.
"""

from __future__ import annotations

from dataclasses import replace

from asd_rt.manifest import Manifest
from asd_rt.plan import ListedPlan
from asd_rt.planner import is_large
from asd_rt.progress import Progress
from asd_rt.session import Session
from export.reference import TorchDenoiser, TorchEngine
from export.samples import latent_sizes, sample_context, sample_noise
from train.checkpoint import Checkpoint

LARGEST = (16, 24)  # latents of a rollout: ranges need no more
PLANS = ((4, 1, 3, 2), (2, 4, 1, 3), (1, 3, 2, 4))
VIDEOS = 6  # of a small network; of a large one, one for each plan


def play_rollouts(
    checkpoint: Checkpoint, manifest: Manifest, denoiser: TorchDenoiser, what: str, seed: int
) -> None:
    """Play all videos through `denoiser`; `what` is what the progress bar calls it.

    Args:
        checkpoint: of the student; its own prompts are used where it has some.
        manifest: geometry and schedule of the engine to be.
        denoiser: with the student's network, and maybe hooks that watch it.
        what: for the progress bar.
        seed: of noise and prompts; each video has another.
    """
    count = len(PLANS) if is_large(manifest.model) else VIDEOS
    with Progress(what, count) as progress:
        for index in range(count):
            _play(checkpoint, manifest, denoiser, index, seed + index)
            progress.advance()


def _play(
    checkpoint: Checkpoint, manifest: Manifest, denoiser: TorchDenoiser, index: int, seed: int
) -> None:
    """Play video `index`: its own prompt, noise and plan."""
    sizes = latent_sizes(manifest)
    rows, columns = sizes[index % len(sizes)]
    size = min(rows, LARGEST[0]), min(columns, LARGEST[1])
    noise = sample_noise(manifest, size, 1, seed)
    engine = TorchEngine(checkpoint, replace(manifest, latent_hw=None), denoiser.model)
    engine.denoiser = denoiser
    context = sample_context(checkpoint, 1, seed).numpy()
    Session(engine, join=False).replay(
        noise, context, plan=ListedPlan(PLANS[index % len(PLANS)]), dump_cache=True
    )
