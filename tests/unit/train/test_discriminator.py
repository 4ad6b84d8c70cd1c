"""The ASD discriminator."""

from __future__ import annotations

import torch

from train.discriminator import Discriminator


def test_discriminator_gives_one_logit_a_clip_and_knows_n() -> None:
    torch.manual_seed(0)
    network = Discriminator(dim=16, layers=2, heads=2)
    features = [torch.randn(3, 2, 5, 16) for _ in range(2)]
    one = network(features, torch.tensor([1, 1, 1]), torch.rand(3, 2))
    two = network(features, torch.tensor([2, 2, 2]), torch.rand(3, 2))
    assert one.shape == (3,)
    assert not torch.allclose(one, two)
