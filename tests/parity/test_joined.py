"""Joined passes against separate ones through ONNX Runtime: the same video over 50 blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asd_rt.backends.base import open_backend
from asd_rt.config import CacheConfig, ModelConfig
from asd_rt.manifest import read_manifest, write_manifest
from asd_rt.plan import ListedPlan
from asd_rt.session import Session
from export.build import main
from train.checkpoint import save_checkpoint
from train.deployment import Deployment
from train.model import WanModel

CONFIG = ModelConfig(
    dim=48, ffn_dim=96, freq_dim=16, text_dim=8, text_len=4, in_dim=4, out_dim=4, num_heads=2,
    num_layers=2,
)  # fmt: skip
BLOCKS = 50


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose graphs serve any block size and window."""
    torch.manual_seed(1)
    model = WanModel(CONFIG)
    torch.nn.init.xavier_uniform_(model.head.head.weight)
    folder = tmp_path_factory.mktemp("joined")
    save_checkpoint(folder / "checkpoint", CONFIG, model.state_dict(), Deployment(3, 12, 3))
    words = ["--checkpoint", str(folder / "checkpoint"), "--target", "onnx", "--out", str(folder)]
    assert main(words) == 0
    return folder / "asd_fp32.onnx"


@pytest.mark.parametrize(("block", "window", "sink"), [(1, 7, 1), (3, 12, 3), (3, 10, 1)])
def test_fifty_blocks(
    block: int, window: int, sink: int, built: Path, relative_l2: Callable[[Any, Any], float]
) -> None:
    manifest = read_manifest(built)
    write_manifest(built, replace(manifest, cache=CacheConfig(block, window, sink)))
    engine = open_backend(built)
    draw = np.random.default_rng(0)
    noise = draw.standard_normal((1, BLOCKS * block, 4, 4, 6)).astype(np.float32)
    context = draw.standard_normal((1, 4, 8)).astype(np.float32)
    plan = ListedPlan((4, 1, 2, *[1] * 46, 3))
    apart, joined = (
        Session(engine, join=join).replay(noise, context, plan=plan, dump_cache=True)
        for join in (False, True)
    )
    assert [b.joined for b in joined.blocks] == [False] + [True] * (BLOCKS - 1)
    assert relative_l2(joined.latents, apart.latents) <= 1e-5
    assert relative_l2(joined.latents[:, -block:], apart.latents[:, -block:]) <= 1e-5
    for name, tensor in apart.cache.items():
        assert relative_l2(joined.cache[name], tensor) <= 1e-5, name
