"""Scores of clips against their prompts, by the classifier, with bootstrap intervals.

Every row of a table is judged on the same prompts; every student row also starts from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from asd_rt.config import CacheConfig
from asd_rt.schedule import MAX_STEPS, TRAIN_TIMESTEPS, Schedule
from train.classifier import Classifier
from train.codec import LinearCodec, VocabularyEncoder
from train.losses import guided_x0, shifted_sigma
from train.model import WanModel
from train.precision import mixed_precision
from train.rollout import rollout
from train.tiny_world import DIRECTIONS, NEGATIVE_NAMES, TinyWorld, label_tokens

BATCH = 64
BOOTSTRAP = 1000
ATTRIBUTES = ("digit", "colour", "direction")


@dataclass(frozen=True)
class Score:
    """Share of clips found right, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(hits: NDArray[np.bool_], seed: int = 0) -> Score:
    """Mean of `hits` [N] with the 2.5 and 97.5 percentiles of resampled means."""
    draws = np.random.default_rng(seed).integers(0, len(hits), (BOOTSTRAP, len(hits)))
    low, high = np.percentile(hits[draws].mean(axis=1), [2.5, 97.5])
    return Score(float(hits.mean()), float(low), float(high))


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of two feature sets [N, D]. Source: FID (Heusel et al.)."""
    from scipy.linalg import sqrtm

    root = np.real(sqrtm(np.cov(a.T) @ np.cov(b.T)))
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


@torch.no_grad()
def judge(classifier: Classifier, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Frames [N, F, 3, 32, 32] -> (predicted labels int64 [N, 3], features [N, D])."""
    classifier.eval()
    labels, features = [], []
    for part in frames.split(BATCH):
        labels.append(torch.stack([x.argmax(1) for x in classifier(part)], dim=1))
        features.append(classifier.features(part))
    return torch.cat(labels), torch.cat(features)


@dataclass(frozen=True)
class Row:
    """One line of the score table."""

    name: str
    clips: int
    digit: Score
    colour: Score
    direction: Score
    all_right: Score
    frechet: float


def same_axes(found: Tensor, wanted: Tensor) -> Tensor:
    """Whether directions [N] move along the same axes, whatever way round: bool [N]."""
    axes = torch.tensor(list(DIRECTIONS.values())).abs()
    return (axes[found] == axes[wanted]).all(dim=1)


def score(
    name: str,
    classifier: Classifier,
    frames: Tensor,
    labels: Tensor,
    reference: NDArray[np.float64],
    later: bool = False,
) -> Row:
    """Judge clips against the `labels` [N, 3] they should show.

    Args:
        name: of the row.
        classifier: the judge.
        frames: [N, F, 3, 32, 32].
        labels: digit, colour and direction that were asked for.
        reference: features of real clips, [M, D].
        later: clips from later in a video, where digits may have turned round: only the axes count.
    """
    found, features = judge(classifier, frames)
    hits = (found == labels).numpy()
    if later:
        hits[:, 2] = same_axes(found[:, 2], labels[:, 2]).numpy()
    single = [bootstrap(hits[:, i]) for i in range(3)]
    distance = frechet_distance(features.double().numpy(), reference)
    return Row(name, len(labels), *single, bootstrap(hits.all(axis=1)), distance)


def student_sampler(
    model: WanModel,
    cache: CacheConfig,
    schedule: Schedule,
    codec: LinearCodec,
    text: VocabularyEncoder,
    steps: int,
    first_steps: int,
) -> Callable[[Tensor, int, int], Tensor]:
    """(labels [B, 3], frames, seed) -> decoded frames [B, F, 3, 32, 32]."""

    @torch.no_grad()
    def sample(labels: Tensor, frames: int, seed: int) -> Tensor:
        config = model.config
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(labels), frames, config.in_dim, 8, 8, generator=generator)
        prompt = model.embed_prompt(text(label_tokens(labels, config.text_len)))
        plan = [first_steps] + [steps] * (frames // cache.block_frames - 1)

        def renoise(block: int, step: int, like: Tensor) -> Tensor:
            fresh = torch.Generator().manual_seed((seed * 1009 + block) * 17 + step)
            return torch.randn(like.shape, generator=fresh)

        return codec.decode(rollout(model, cache, schedule, noise, prompt, plan, renoise).latents)

    return sample


def teacher_sampler(
    model: WanModel,
    codec: LinearCodec,
    text: VocabularyEncoder,
    steps: int,
    guidance: float,
    shift: float,
) -> Callable[[Tensor, int, int], Tensor]:
    """Euler sampling of whole clips from the bidirectional teacher, with classifier-free guidance."""

    @torch.no_grad()
    def sample(labels: Tensor, frames: int, seed: int) -> Tensor:
        config = model.config
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(labels), frames, config.in_dim, 8, 8, generator=generator)
        named = torch.tensor([NEGATIVE_NAMES]).expand(len(labels), -1)
        tokens = [label_tokens(labels, config.text_len, keep) for keep in (None, named)]
        context = text(torch.cat(tokens))
        sigmas = shifted_sigma(torch.linspace(1, 0, steps + 1), shift)
        clip = noise
        for now, after in pairwise(sigmas):
            timesteps = torch.full((2 * len(labels), frames), TRAIN_TIMESTEPS * float(now))
            with mixed_precision():
                flow = model(torch.cat([clip, clip]), timesteps, context).float()
            clip = clip + (after - now) * guided_x0(*flow.chunk(2), guidance)
        return codec.decode(clip)

    return sample


def sample_all(
    sampler: Callable[[Tensor, int, int], Tensor], labels: Tensor, frames: int, name: str
) -> Tensor:
    """Sample a clip for every label, in batches with a progress bar; batch i uses seed i."""
    parts = labels.split(BATCH)
    bar = tqdm(parts, desc=name, unit="batch", leave=False)
    return torch.cat([sampler(part, frames, 10_000 + i) for i, part in enumerate(bar)])


def real_reference(
    classifier: Classifier, codec: LinearCodec, clips: int, frames: int
) -> NDArray[np.float64]:
    """Features of real training clips after the codec: what a perfect generator would show."""
    real = TinyWorld("train").draw(clips, frames, torch.Generator().manual_seed(77)).frames
    return judge(classifier, codec.decode(codec.encode(real)))[1].double().numpy()


STUDENT_PLANS = {
    "student, 4 steps": (4, 4),
    "student, 3 steps": (3, 3),
    "student, 2 steps": (2, 2),
    "student, 2* steps (FFE)": (2, MAX_STEPS),
    "student, 1 step": (1, 1),
    "student, 1* step (FFE)": (1, MAX_STEPS),
}


def markdown(rows: list[Row]) -> str:
    """The score table."""
    lines = [
        "| clips | digit | colour | direction | all three right | Frechet distance |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        marks = " | ".join(str(x) for x in (row.digit, row.colour, row.direction, row.all_right))
        lines.append(f"| {row.name} ({row.clips}) | {marks} | {row.frechet:.1f} |")
    return "\n".join(lines) + "\n"
