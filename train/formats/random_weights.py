"""Random networks of real sizes: for tests, and for measuring where the weights cannot be had."""

from __future__ import annotations

import hashlib
from math import sqrt

import torch
from torch import Tensor

from asd_rt.config import ModelConfig
from train.formats.shapes import weight_shapes
from train.formats.write import Source


def _wan(dim: int, ffn_dim: int, layers: int, text_dim: int = 4096) -> ModelConfig:
    return ModelConfig(
        dim=dim, ffn_dim=ffn_dim, freq_dim=256, text_dim=text_dim, text_len=512, in_dim=16, out_dim=16,
        num_heads=dim // 128, num_layers=layers,
    )  # fmt: skip


CONFIGS = {
    "wan_1_3b": _wan(1536, 8960, 30),
    "wan_14b": _wan(5120, 13824, 40),
    "small": _wan(256, 512, 2, text_dim=64),
}


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of one weight, float32; they depend on its official name, its shape and `seed` alone.

    Matrices are Xavier, the head's too, so that activations stay moderate and nothing is hidden by a zero.
    """
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    values = torch.empty(shape)
    if len(shape) in (2, 5):
        rows, columns = shape[0], values[0].numel()
        bound = sqrt(6 / (rows + columns))
        return values.uniform_(-bound, bound, generator=generator)
    values.normal_(generator=generator)
    if name.endswith("modulation"):
        return values.div_(sqrt(shape[-1]))
    if "norm" in name and name.endswith("weight"):
        return values.mul_(0.1).add_(1)
    return values.mul_(0.02)


def random_source(config: ModelConfig, dtype: torch.dtype, seed: int) -> Source:
    """A network of `config` with random weights, to be written in `dtype`; equal seeds give equal weights."""
    shapes = weight_shapes(config)
    types = dict.fromkeys(shapes, dtype)
    return Source(config, shapes, types, lambda name: random_weight(name, shapes[name], seed))
