"""Our network is diffusers' WanTransformer3DModel: the same weights in either's files, the same output."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.checkpoint import load_checkpoint
from train.formats.random_weights import CONFIGS, random_source
from train.formats.write import Source, write_checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is fetched
WanTransformer3DModel = pytest.importorskip("diffusers").WanTransformer3DModel

TOLERANCE = 1e-4
CONFIG = replace(CONFIGS["small"], dim=384, num_heads=3, ffn_dim=320, in_dim=8, out_dim=8)
FRAMES, HEIGHT, WIDTH = 3, 4, 6
Compare = Callable[[NDArray[Any], NDArray[Any]], float]


@pytest.fixture(autouse=True)
def without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading needs accelerate only for modules that stay float32 in a half-precision network."""
    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", None)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents [2, F, C, h, w], timesteps [2, F] and context [2, 512, text_dim], the first of 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, FRAMES, CONFIG.in_dim, HEIGHT, WIDTH, generator=generator)
    context = torch.randn(2, CONFIG.text_len, CONFIG.text_dim, generator=generator)
    context[0, 7:] = 0
    timesteps = torch.tensor([[937.5, 0.0, 625.0], [250.0, 1000.0, 833.25]])
    return latents, timesteps, context


@torch.no_grad()
def check_equal(
    folder: Path, theirs: Any, inputs: tuple[Tensor, Tensor, Tensor], compare: Compare
) -> None:
    """Both networks on one timestep for a whole clip, and on another for each frame."""
    ours = load_checkpoint(folder).build_model()
    latents, timesteps, context = inputs
    video = latents.transpose(1, 2)
    clip = timesteps[:, 0]
    tokens = timesteps.repeat_interleave(HEIGHT * WIDTH // 4, dim=1)
    for own, other in ((clip[:, None].expand(-1, FRAMES), clip), (timesteps, tokens)):
        expected = theirs(video, other, context, return_dict=False)[0].transpose(1, 2).numpy()
        assert np.abs(expected).mean() > 0.1
        found = ours(latents, own, context).numpy()
        assert compare(found, expected) <= TOLERANCE
    short = ours(latents[:1], timesteps[:1], context[:1, :7]).numpy()
    assert compare(short, expected[:1]) <= TOLERANCE


@pytest.mark.parametrize("shards", [False, True])
def test_their_files_in_our_network(
    tmp_path: Path, inputs: tuple[Tensor, Tensor, Tensor], relative_l2: Compare, shards: bool
) -> None:
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=128, in_channels=8, out_channels=8, text_dim=64,
        freq_dim=256, ffn_dim=320, num_layers=2,
    )  # fmt: skip
    for weight in theirs.parameters():  # at birth many are ones and zeros, which hide mistakes
        weight.data += 0.02 * torch.randn_like(weight)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="6MB" if shards else "1GB")
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists() == shards
    check_equal(tmp_path, theirs.eval(), inputs, relative_l2)
    assert load_checkpoint(tmp_path / "transformer").config == CONFIG


@pytest.mark.parametrize("shard_bytes", [10**10, 6 * 10**6])
def test_our_files_in_their_network(
    tmp_path: Path, inputs: tuple[Tensor, Tensor, Tensor], relative_l2: Compare, shard_bytes: int
) -> None:
    source = random_source(CONFIG, torch.float32, seed=3)
    write_checkpoint(tmp_path / "official", "official", source)
    ours = load_checkpoint(tmp_path / "official")
    stored = Source(ours.config, source.shapes, source.dtypes, ours.weights.__getitem__)
    write_checkpoint(tmp_path / "theirs", "diffusers", stored, shard_bytes)
    theirs, report = WanTransformer3DModel.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(report.values()), report
    check_equal(tmp_path / "official", theirs.eval(), inputs, relative_l2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    source = random_source(CONFIG, dtype, seed=4)
    write_checkpoint(tmp_path / "official", "official", source)
    ours = load_checkpoint(tmp_path / "official")
    stored = Source(ours.config, source.shapes, source.dtypes, ours.weights.__getitem__)
    write_checkpoint(tmp_path / "theirs", "diffusers", stored)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "theirs", torch_dtype=dtype)
    theirs.save_pretrained(tmp_path / "back")
    back = load_checkpoint(tmp_path / "back")
    assert back.config == ours.config
    assert back.weights.keys() == ours.weights.keys()
    for name, weight in ours.weights.items():
        assert back.weights[name].dtype == dtype
        assert torch.equal(back.weights[name], weight), name
