"""The smallest checkpoint with all parts, and one engine built from it for all tests here."""

from __future__ import annotations

import logging
from collections.abc import Callable
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
def student(make_once: Callable[..., Path]) -> Path:
    def save(folder: Path) -> None:
        torch.manual_seed(0)
        model = WanModel(CONFIG)
        torch.nn.init.normal_(model.head.head.weight)
        codec = LinearCodec(2)
        codec.encoder.normal_()
        codec.decoder.normal_()
        told, table = Deployment(2, 6, 1, 3.0, (4, 2), 8, 4, {"red": 1, "a": 0}), torch.eye(3)
        save_checkpoint(
            folder / "student", CONFIG, model.state_dict(), told, codec, table, half=True
        )

    return make_once("export_student", save) / "student"


@pytest.fixture(scope="session")
def bare_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that makes latents of 2 channels and has no codec."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bare"
    torch.manual_seed(0)
    save_checkpoint(folder, CONFIG, WanModel(CONFIG).state_dict())
    return folder


@pytest.fixture(scope="session")
def built(student: Path, make_once: Callable[..., Path]) -> Path:
    """A folder with an fp32 ONNX engine of `student`, for reading only."""

    def build(folder: Path) -> None:
        words = ["--checkpoint", str(student), "--target", "onnx", "--out", str(folder)]
        assert main(words) == 0

    return make_once("export_built", build)


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("export").setLevel(logging.INFO)
