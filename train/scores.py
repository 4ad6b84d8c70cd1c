"""What clips of the tiny world are worth: what they show, how well, and how sure that is.

Each clip is measured once (`measure`); figures are means over clips (`score`), with 95 % bootstrap intervals
over the prompts. All subjects are asked for the same prompts, so their resamples are the same too, and
differences between subjects can be judged pair by pair.

| figure | what it is |
|---|---|
| digit, colour, motion | percent of clips in which the judge finds what was asked for |
| all_right | percent with all three |
| semantic | mean of digit, colour and motion |
| frechet | Frechet distance of the judge's appearance features to real clips' |
| appearance | 100 (1 - frechet / spread), not below 0 |
| consistency | how much of a digit is found again one pixel further in the next frame |
| sharpness | squared differences of neighbouring pixels beside those of real clips |
| quality | mean of appearance, consistency and sharpness |
| total | (4 quality + semantic) / 5, the weights of VBench |

The spread is the total variance of real clips' features, the distance of a generator that draws one average
clip for ever. Consistency and sharpness are 100 where clips are as real ones of the same prompts.
Sharpness is the smaller of the two values by the larger: blur costs, and so does speckle, which a plain ratio
would reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.judge import ATTRIBUTES, BATCH, Judge, right
from train.tiny_world import BORDER, CANVAS, DIRECTIONS, TinyWorld, without_trail

Numbers = NDArray[np.float64]
RESAMPLES = 200
BOOTSTRAP = 1000  # of a plain share, which costs nothing
FIGURES = (
    *(*ATTRIBUTES, "all_right", "semantic", "frechet"),
    *("appearance", "consistency", "sharpness", "quality", "total"),
)
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
REAL_SEED = 77


@dataclass(frozen=True)
class Score:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def points(self) -> str:
        """With one digit, for figures of 0 to 100."""
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def bootstrap(hits: NDArray[np.bool_], seed: int = 0) -> Score:
    """Mean of `hits` [N] with the 2.5 and 97.5 percentiles of resampled means."""
    draws = np.random.default_rng(seed).integers(0, len(hits), (BOOTSTRAP, len(hits)))
    low, high = np.percentile(hits[draws].mean(axis=1), [2.5, 97.5])
    return Score(float(hits.mean()), float(low), float(high))


@dataclass(frozen=True, eq=False)
class Marks:
    """What is measured of clips, one entry a clip.

    Attributes:
        hits: bool [N, 3], what was asked for and is there: digit, colour, motion.
        features: of the judge, [N, D].
        consistency: share of the digit found again in the next frame, [N].
        edges: mean squared difference of neighbouring pixels inside the arena, [N].
    """

    hits: NDArray[np.bool_]
    features: Numbers
    consistency: Numbers
    edges: Numbers


@dataclass(frozen=True, eq=False)
class Reference:
    """Real clips that others are measured by.

    Attributes:
        mean: of their features, [D].
        covariance: of their features, [D, D].
        root: its square root.
        consistency, edges: means over clips, see `Marks`.
    """

    mean: Numbers
    covariance: Numbers
    root: Numbers
    consistency: float
    edges: float

    @property
    def spread(self) -> float:
        """Total variance of the features."""
        return float(np.trace(self.covariance))


@torch.no_grad()
def frame_consistency(frames: Tensor) -> Tensor:
    """Share of the digit that is found again in the next frame, one pixel further in some direction: [N].

    1 - |shifted - next| / (|frame| + |next|) over the digit without its trail, for the best of the eight
    directions, as a mean over pairs of frames. All digits move, so standing still does not count as
    consistent; a frame that shows nothing counts 0.

    Args:
        frames: [N, F, 3, H, W] in 0..1.
    """
    digits = without_trail(frames)
    now, after = digits[:, :-1], digits[:, 1:]
    pixels = (2, 3, 4)
    size = now.sum(pixels) + after.sum(pixels)
    gaps = [
        (now.roll(step, (3, 4)) - after).abs().sum(pixels)
        for step in map(tuple, DIRECTIONS.values())
    ]
    found = 1 - torch.stack(gaps).amin(dim=0) / size.clamp_min(1e-6)
    return torch.where(size > 1.0, found, 0.0).mean(dim=1)


@torch.no_grad()
def edge_strength(frames: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels inside the arena, [N]; frames [N, F, 3, H, W]."""
    inside = frames[..., BORDER : CANVAS - BORDER, BORDER : CANVAS - BORDER]
    rows = (inside[..., 1:, :] - inside[..., :-1, :]).square().mean(dim=(1, 2, 3, 4))
    return rows + (inside[..., 1:] - inside[..., :-1]).square().mean(dim=(1, 2, 3, 4))


def measure(judge: Judge, frames: Tensor, labels: Tensor, later: bool = False) -> Marks:
    """Measure clips [N, F, 3, 32, 32] against the `labels` [N, 3] they should show; see `Judge.hits`."""
    frames = frames.nan_to_num()  # an engine that overflows makes bad clips, and no error here
    found, features = judge.look(frames)
    parts = frames.split(BATCH)
    return Marks(
        hits=right(found, labels, later),
        features=features.double().numpy(),
        consistency=torch.cat([frame_consistency(part) for part in parts]).double().numpy(),
        edges=torch.cat([edge_strength(part) for part in parts]).double().numpy(),
    )


def real_reference(judge: Judge, labels: Tensor, frames: int) -> Reference:
    """Real clips of training glyphs after the codec: what a perfect generator would show.

    Two clips for every prompt, so that the reference has the subjects' mixture of prompts.

    Args:
        judge: whose features are used.
        labels: int64 [N, 3], the prompts of the subjects.
        frames: of a clip.
    """
    twice = labels.repeat(2, 1)
    generator = torch.Generator().manual_seed(REAL_SEED)
    real = TinyWorld("train").draw(len(twice), frames, generator, twice).frames
    marks = measure(judge, judge.codec.decode(judge.codec.encode(real)), twice)
    covariance = np.cov(marks.features.T)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return Reference(
        mean=marks.features.mean(axis=0),
        covariance=covariance,
        root=root,
        consistency=float(marks.consistency.mean()),
        edges=float(marks.edges.mean()),
    )


def frechet_distance(features: Numbers, reference: Reference) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of features [N, D]. Source: FID (Heusel et al.)."""
    return _distance(features, features @ reference.root, reference)


def _distance(features: Numbers, turned: Numbers, reference: Reference) -> float:
    """See `frechet_distance`; `turned` is features times the root of the reference's covariance.

    (A B)^1/2 has the trace of (B^1/2 A B^1/2)^1/2, whose eigenvalues are the squared singular values of the
    turned, centred features: those of the smaller one of the two products with their transpose.
    """
    count, size = features.shape
    turned = turned - turned.mean(axis=0)
    product = turned.T @ turned if count > size else turned @ turned.T
    values = np.linalg.eigvalsh(product / (count - 1))
    shift = features.mean(axis=0) - reference.mean
    own = float(features.var(axis=0, ddof=1).sum())
    return float(shift @ shift + own + reference.spread - 2 * np.sqrt(values.clip(0)).sum())


@dataclass(frozen=True)
class Scores:
    """All figures of one subject.

    Attributes:
        values: name -> value, see FIGURES.
        draws: name -> its values over RESAMPLES resamples of the prompts, the same for all subjects.
    """

    values: dict[str, float]
    draws: dict[str, list[float]]

    def of(self, name: str) -> Score:
        """One figure with its interval."""
        low, high = np.percentile(self.draws[name], [2.5, 97.5])
        return Score(self.values[name], float(low), float(high))

    def to_json(self) -> dict[str, list[float]]:
        """Name -> [value, low, high]."""
        found = {name: self.of(name) for name in FIGURES}
        return {k: [round(x, 3) for x in (s.value, s.low, s.high)] for k, s in found.items()}


def score(marks: Marks, reference: Reference, seed: int = 0) -> Scores:
    """Figures of clips, with resamples of the prompts.

    The Frechet distance of fewer clips is larger, and a resample holds fewer different ones. So its
    resamples are shifted by a constant to have the measured distance as their mean.
    """
    count = len(marks.hits)
    indices = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    turned = marks.features @ reference.root
    distances = np.array([_distance(marks.features[i], turned[i], reference) for i in indices])
    whole = np.arange(count)
    distance = frechet_distance(marks.features, reference)
    values = _figures(marks, reference, whole, distance)
    draws = [
        _figures(marks, reference, index, max(0.0, d))
        for index, d in zip(indices, distances - distances.mean() + distance, strict=True)
    ]
    return Scores(values, {name: [draw[name] for draw in draws] for name in FIGURES})


def _figures(
    marks: Marks, reference: Reference, index: NDArray[np.int64], distance: float
) -> dict[str, float]:
    hits = 100 * marks.hits[index].astype(np.float64)
    edges = float(marks.edges[index].mean()) / reference.edges
    found = dict(zip(ATTRIBUTES, hits.mean(axis=0).tolist(), strict=True))
    found["all_right"] = float(hits.min(axis=1).mean())
    found["semantic"] = float(hits.mean())
    found["frechet"] = distance
    found["appearance"] = 100 * max(0.0, 1 - distance / reference.spread)
    relative = float(marks.consistency[index].mean()) / reference.consistency
    found["consistency"] = 100 * float(np.clip(relative, 0, 1))
    found["sharpness"] = 100 * min(edges, 1 / max(edges, 1e-9))
    found["quality"] = (found["appearance"] + found["consistency"] + found["sharpness"]) / 3
    found["total"] = (QUALITY_WEIGHT * found["quality"] + SEMANTIC_WEIGHT * found["semantic"]) / (
        QUALITY_WEIGHT + SEMANTIC_WEIGHT
    )
    return found
