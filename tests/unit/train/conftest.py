"""Small networks for training tests."""

from __future__ import annotations

import pytest
import torch

from asd_rt.config import ModelConfig
from train.model import WanModel


def small_config(**changes: int) -> ModelConfig:
    values: dict[str, int] = {
        "dim": 32,
        "ffn_dim": 48,
        "freq_dim": 16,
        "text_dim": 8,
        "text_len": 5,
        "in_dim": 4,
        "out_dim": 4,
        "num_heads": 2,
        "num_layers": 2,
    }
    return ModelConfig(**(values | changes))


@pytest.fixture
def model() -> WanModel:
    torch.manual_seed(0)
    network = WanModel(small_config())
    torch.nn.init.normal_(network.head.head.weight, std=0.2)
    return network
