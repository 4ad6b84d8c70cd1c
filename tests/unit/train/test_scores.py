"""Figures of clips: right where the answer is known, and worse for every kind of damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.classifier import Classifier
from train.codec import LinearCodec
from train.judge import Judge, same_axes
from train.scores import (
    FIGURES,
    RESAMPLES,
    Marks,
    Reference,
    bootstrap,
    edge_strength,
    frame_consistency,
    frechet_distance,
    measure,
    real_reference,
    score,
)
from train.tiny_world import DIRECTIONS, TinyWorld, random_labels

CLIPS = 48


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Untrained: its features tell clips apart all the same."""
    torch.manual_seed(0)
    codec = LinearCodec(24)
    codec.fit(TinyWorld("train"), 0)
    return Judge(Classifier().eval().requires_grad_(False), codec)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return random_labels(CLIPS, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def real(judge: Judge, labels: Tensor) -> Tensor:
    frames = TinyWorld("test").draw(CLIPS, 6, torch.Generator().manual_seed(1), labels).frames
    return judge.codec.decode(judge.codec.encode(frames))


def reference_of(features: np.ndarray) -> Reference:
    covariance = np.cov(features.T)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values)) @ vectors.T
    return Reference(features.mean(axis=0), covariance, root, 1.0, 1.0)


def test_bootstrap_interval_holds_the_value() -> None:
    hits = np.random.default_rng(0).random(500) < 0.8
    result = bootstrap(hits)
    assert result.low < result.value < result.high
    assert result.high - result.low == pytest.approx(4 * np.sqrt(0.8 * 0.2 / 500), rel=0.2)
    assert bootstrap(np.ones(10, dtype=bool)).low == 1.0


def test_frechet_distance_of_known_gaussians() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (20000, 3))
    b = rng.normal([2, 0, 0], [1, 3, 1], (20000, 3))
    reference = reference_of(a)
    assert frechet_distance(a, reference) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(b, reference) == pytest.approx(4 + 4, rel=0.05)
    assert reference.spread == pytest.approx(3, rel=0.05)


def test_one_average_clip_has_no_appearance() -> None:
    """It lies at the spread from real clips, which is what 0 means."""
    features = np.random.default_rng(0).normal(size=(400, 5))
    reference = reference_of(features)
    constant = np.repeat(features.mean(axis=0)[None], 50, axis=0)
    assert frechet_distance(constant, reference) == pytest.approx(reference.spread, rel=1e-6)
    marks = Marks(np.ones((50, 3), bool), constant, np.ones(50), np.ones(50))
    found = score(marks, reference).values
    assert found["appearance"] == pytest.approx(0, abs=1e-3)
    assert found["consistency"] == found["sharpness"] == found["semantic"] == 100
    assert found["quality"] == pytest.approx(200 / 3, abs=1e-2)
    assert found["total"] == pytest.approx((4 * 200 / 3 + 100) / 5, abs=1e-2)


def test_semantic_counts_answers_and_all_right_whole_clips() -> None:
    rng = np.random.default_rng(0)
    hits = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1]] * 25, dtype=bool)
    features = rng.normal(size=(100, 4))
    marks = Marks(hits, features, np.full(100, 0.9), np.full(100, 2.0))
    found = score(marks, reference_of(features))
    assert found.values["digit"] == 75 and found.values["colour"] == 100
    assert found.values["motion"] == 50 and found.values["all_right"] == 50
    assert found.values["semantic"] == 75
    assert found.values["consistency"] == pytest.approx(90)
    assert found.values["sharpness"] == 50  # twice as many edges as real clips have: speckle
    assert set(found.values) == set(found.draws) == set(FIGURES)
    for name in FIGURES:
        assert len(found.draws[name]) == RESAMPLES
        interval = found.of(name)
        assert interval.low <= interval.value + 1e-9 and interval.value <= interval.high + 1e-9
    wide = found.of("all_right")
    assert wide.high - wide.low == pytest.approx(100 * 4 * np.sqrt(0.25 / 100), rel=0.3)


def test_all_subjects_are_resampled_alike() -> None:
    features = np.random.default_rng(0).normal(size=(60, 4))
    reference = reference_of(features)
    hits = np.random.default_rng(1).random((60, 3)) < 0.7
    one, two = (
        score(Marks(h, features, np.ones(60), np.ones(60)), reference) for h in (hits, ~hits)
    )
    total = np.add(one.draws["digit"], two.draws["digit"])
    np.testing.assert_allclose(total, 100)


def test_real_clips_are_consistent_and_damage_is_seen(real: Tensor) -> None:
    whole = frame_consistency(real)
    assert whole.mean() > 0.9
    still = real[:, :1].expand(-1, 6, -1, -1, -1)
    mixed = real.clone()
    mixed[:, ::2] = real[torch.arange(CLIPS) - 1][:, ::2]  # another clip in every second frame
    for worse in (still, mixed):
        assert frame_consistency(worse).mean() < whole.mean() - 0.1
    assert (
        frame_consistency(torch.zeros_like(real)).max() == 0
    )  # nothing is there to be found again


def test_blur_and_speckle_both_cost_sharpness(judge: Judge, labels: Tensor, real: Tensor) -> None:
    reference = real_reference(judge, labels, 6)

    def sharpness(frames: Tensor) -> float:
        return score(measure(judge, frames, labels), reference).values["sharpness"]

    blurred = F.avg_pool2d(real.flatten(0, 1), 3, 1, 1).view_as(real)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    speckled = (real + 0.15 * noise).clamp(0, 1)
    assert (
        edge_strength(blurred).mean() < edge_strength(real).mean() < edge_strength(speckled).mean()
    )
    assert sharpness(real) > 90
    assert sharpness(blurred) < 60
    assert sharpness(speckled) < 60


def test_measure_counts_what_the_classifier_says(
    judge: Judge, labels: Tensor, real: Tensor
) -> None:
    found, features = judge.look(real)
    marks = measure(judge, real, found)
    assert marks.hits.all()
    assert marks.features.shape == features.shape == (CLIPS, 256)
    assert not measure(judge, torch.full_like(real, torch.nan), labels).hits.all()


def test_axes_forgive_having_turned_round() -> None:
    names = list(DIRECTIONS)
    wanted = torch.tensor([names.index(n) for n in ("left", "left", "left", "up and left", "up")])
    found = torch.tensor(
        [names.index(n) for n in ("left", "right", "up", "down and right", "up and left")]
    )
    assert same_axes(found, wanted).tolist() == [True, True, False, True, False]
