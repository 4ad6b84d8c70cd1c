"""Scores, intervals, the discriminator and the classifier's invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.classifier import Classifier
from train.discriminator import Discriminator
from train.evaluate import bootstrap, frechet_distance, markdown, same_axes, score
from train.tiny_world import DIRECTIONS, TinyWorld, random_labels


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
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(a, b) == pytest.approx(4 + 4, rel=0.05)


def test_score_counts_what_the_classifier_says() -> None:
    torch.manual_seed(0)
    classifier = Classifier()
    labels = random_labels(32, torch.Generator().manual_seed(0))
    frames = TinyWorld("test").draw(32, 3, torch.Generator().manual_seed(1), labels).frames
    row = score("x", classifier, frames, labels, np.random.default_rng(0).normal(size=(64, 256)))
    assert row.clips == 32
    assert row.all_right.value <= min(row.digit.value, row.colour.value, row.direction.value)
    assert "| x (32) |" in markdown([row])


def test_axes_forgive_having_turned_round() -> None:
    names = list(DIRECTIONS)
    wanted = torch.tensor([names.index(n) for n in ("left", "left", "left", "up and left", "up")])
    found = torch.tensor(
        [names.index(n) for n in ("left", "right", "up", "down and right", "up and left")]
    )
    assert same_axes(found, wanted).tolist() == [True, True, False, True, False]


def test_discriminator_gives_one_logit_a_clip_and_knows_n() -> None:
    torch.manual_seed(0)
    network = Discriminator(dim=16, layers=2, heads=2)
    features = [torch.randn(3, 2, 5, 16) for _ in range(2)]
    one = network(features, torch.tensor([1, 1, 1]), torch.rand(3, 2))
    two = network(features, torch.tensor([2, 2, 2]), torch.rand(3, 2))
    assert one.shape == (3,)
    assert not torch.allclose(one, two)
