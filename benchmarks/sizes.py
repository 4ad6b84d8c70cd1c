"""Networks of random weights at the sizes that benchmarks speak of: speed does not depend on the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asd_rt.config import CacheConfig, ModelConfig
from train.checkpoint import Checkpoint
from train.deployment import Deployment
from train.model import WanModel


@dataclass(frozen=True)
class Size:
    """A network with the latents and the cache that it is measured at."""

    model: ModelConfig
    cache: CacheConfig
    latent_hw: tuple[int, int]


def _small(dim: int) -> ModelConfig:
    return ModelConfig(
        dim=dim, ffn_dim=4 * dim, freq_dim=256, text_dim=256, text_len=32, in_dim=16, out_dim=16,
        num_heads=dim // 64, num_layers=12,
    )  # fmt: skip


# One of the 30 equal blocks of Wan2.1 1.3B; the whole would need tens of gigabytes with all its rivals.
_WAN_BLOCK = ModelConfig(
    dim=1536, ffn_dim=8960, freq_dim=256, text_dim=4096, text_len=512, in_dim=16, out_dim=16,
    num_heads=12, num_layers=1,
)  # fmt: skip

SIZES = {
    "28m": Size(_small(384), CacheConfig(block_frames=3, window_frames=21), (16, 16)),
    "113m": Size(_small(768), CacheConfig(block_frames=3, window_frames=21), (16, 16)),
    "wan-block-240x416": Size(_WAN_BLOCK, CacheConfig(block_frames=3, window_frames=9), (30, 52)),
    "wan-block-480x832": Size(_WAN_BLOCK, CacheConfig(block_frames=1, window_frames=7), (60, 104)),
}


def random_checkpoint(name: str) -> Checkpoint:
    """A checkpoint of size `name` with random weights, the same every time; no codec and no text encoder."""
    size = SIZES[name]
    torch.manual_seed(0)
    model = WanModel(size.model)
    torch.nn.init.xavier_uniform_(
        model.head.head.weight
    )  # zero at birth, which would hide all else
    deployment = Deployment(
        block_frames=size.cache.block_frames,
        window_frames=size.cache.window_frames,
        sink_frames=size.cache.sink_frames,
        latent_hw=size.latent_hw,
    )
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    return Checkpoint(f"random-{name}", "0" * 64, size.model, weights, deployment, None, None)
