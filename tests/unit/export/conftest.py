"""The smallest checkpoint with all parts, and one engine built from it for all tests here."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from asd_rt.config import ModelConfig
from export.build import main
from train.checkpoint import save_checkpoint
from train.codec import LinearCodec
from train.deployment import Deployment
from train.model import WanModel

CONFIG = ModelConfig(
    dim=32,
    ffn_dim=24,
    freq_dim=4,
    text_dim=3,
    text_len=4,
    in_dim=2,
    out_dim=2,
    num_heads=2,
    num_layers=1,
)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "student"
    torch.manual_seed(0)
    model = WanModel(CONFIG)
    torch.nn.init.normal_(model.head.head.weight)
    codec = LinearCodec(2)
    codec.encoder.normal_()
    codec.decoder.normal_()
    deployment = Deployment(2, 6, 1, 3.0, (4, 2), 8, 4, {"red": 1, "a": 0})
    save_checkpoint(folder, CONFIG, model.state_dict(), deployment, codec, torch.eye(3), half=True)
    return folder


@pytest.fixture(scope="session")
def bare_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that makes latents of 2 channels and has no codec."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bare"
    torch.manual_seed(0)
    save_checkpoint(folder, CONFIG, WanModel(CONFIG).state_dict())
    return folder


@pytest.fixture(scope="session")
def built(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an fp32 ONNX engine of `student`, for reading only."""
    folder = tmp_path_factory.mktemp("engines")
    assert main(["--checkpoint", str(student), "--target", "onnx", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("export").setLevel(logging.INFO)
