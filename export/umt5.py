"""The UMT5 encoder as a function of its weights, which may be stored in fewer bits than they are used in.

Weights are arguments and not parameters, so that the graph of a network of any size is made without them.
Names are those of Wan's official file; matrices are [in, out].

| name | shape |
|---|---|
| token_embedding | [vocab_size, d_model] |
| blocks.N.norm1, blocks.N.norm2, norm | [d_model] |
| blocks.N.pos_embedding | [relative_attention_num_buckets, num_heads] |
| blocks.N.attn.{q,k,v} | [d_model, num_heads * d_kv] |
| blocks.N.attn.o | [num_heads * d_kv, d_model] |
| blocks.N.ffn.{gate,fc1} | [d_model, d_ff] |
| blocks.N.ffn.fc2 | [d_ff, d_model] |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asd_rt.errors import ConfigError

Weights = Mapping[str, Tensor]
TABLE = "token_embedding"


@dataclass(frozen=True)
class Umt5Config:
    """Hyper-parameters of the encoder, in the names of transformers' config.json."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not (whole or (name == "layer_norm_epsilon" and 0 < value < 1)):
                raise ConfigError(f"text encoder: {name} must be a number > 0, found {value!r}")
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets % 4 or distance <= buckets // 4:
            raise ConfigError(
                f"text encoder: {buckets} buckets of relative positions do not fit a distance of {distance}"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name, in the order in which the network uses them."""
        found: dict[str, tuple[int, ...]] = {TABLE: (self.vocab_size, self.d_model)}
        for i in range(self.num_layers):
            found |= {f"blocks.{i}.{name}": shape for name, shape in self._block().items()}
        return found | {"norm": (self.d_model,)}

    def _block(self) -> dict[str, tuple[int, ...]]:
        inner = self.num_heads * self.d_kv
        return {
            "norm1": (self.d_model,),
            "pos_embedding": (self.relative_attention_num_buckets, self.num_heads),
            **{f"attn.{name}": (self.d_model, inner) for name in "qkv"},
            "attn.o": (inner, self.d_model),
            "norm2": (self.d_model,),
            "ffn.gate": (self.d_model, self.d_ff),
            "ffn.fc1": (self.d_model, self.d_ff),
            "ffn.fc2": (self.d_ff, self.d_model),
        }


def is_matrix(name: str) -> bool:
    """Whether a weight is one of the large ones, which are stored in the precision of the part."""
    return name == TABLE or ".attn." in name or ".ffn." in name


def buckets_by_offset(config: Umt5Config) -> Tensor:
    """Bucket of each relative position -distance .. distance, int64 [2 * distance + 1].

    Half of the buckets are for keys behind the query. In each half the first ones stand for one offset each,
    the others for ranges that grow with the logarithm; what is further away than `distance` shares the last.
    """
    half, distance = (
        config.relative_attention_num_buckets // 2,
        config.relative_attention_max_distance,
    )
    exact = half // 2
    offsets = torch.arange(-distance, distance + 1)
    far = offsets.abs().clamp(min=1)
    # In float32, as the reference: at the edges of ranges another rounding is another bucket.
    ratio = torch.log(far.float() / exact) / math.log(distance / exact) * (half - exact)
    ranged = (exact + ratio.to(torch.int64)).clamp(max=half - 1)
    bucket = torch.where(offsets.abs() < exact, offsets.abs(), ranged)
    return bucket + half * (offsets > 0)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x [..., in] float32 times a stored matrix; scales of int8 columns are applied to the small result."""
    y = x @ weights[name].float()
    return y * weights[f"{name}.scale"] if f"{name}.scale" in weights else y


def embed(weights: Weights, tokens: Tensor) -> Tensor:
    """Token ids [B, L] -> float32 [B, L, d_model]; only the rows that are read are widened."""
    x = F.embedding(tokens, weights[TABLE]).float()
    scale = f"{TABLE}.scale"
    return x * F.embedding(tokens, weights[scale]) if scale in weights else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, heads * d_kv] -> [B, L, heads, d_kv]."""
    return x.view(*x.shape[:2], heads, x.shape[2] // heads)


def positions(length: int, buckets: Tensor) -> Tensor:
    """Buckets of all pairs of positions, int64 [length (queries), length (keys)]."""
    distance = len(buckets) // 2
    index = torch.arange(length)
    return buckets[(index[None] - index[:, None]).clamp(-distance, distance) + distance]


def run_block(
    config: Umt5Config, weights: Weights, prefix: str, x: Tensor, places: Tensor, mask: Tensor
) -> Tensor:
    """One layer.

    Args:
        config: of the encoder.
        weights: at least those of the layer.
        prefix: "blocks.N".
        x: float32 [B, L, d_model].
        places: `positions` of L.
        mask: float32 [B, 1, 1, L], 0 for tokens and very negative for padding.

    Returns:
        float32 [B, L, d_model].
    """
    eps, heads = config.layer_norm_epsilon, config.num_heads
    y = rms_norm(x, weights[f"{prefix}.norm1"], eps)
    q, k, v = (
        split_heads(linear(weights, f"{prefix}.attn.{name}", y), heads).transpose(1, 2)
        for name in "qkv"
    )
    bias = F.embedding(places, weights[f"{prefix}.pos_embedding"]).permute(2, 0, 1)
    scores = q @ k.transpose(2, 3) + (bias + mask)  # not scaled: the weights are trained so
    out = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
    x = x + linear(weights, f"{prefix}.attn.o", out)
    y = rms_norm(x, weights[f"{prefix}.norm2"], eps)
    gate = F.gelu(linear(weights, f"{prefix}.ffn.gate", y), approximate="tanh")
    y = gate * linear(weights, f"{prefix}.ffn.fc1", y)
    return x + linear(weights, f"{prefix}.ffn.fc2", y)


def padding(mask: Tensor) -> Tensor:
    """Mask int64 [B, L] of ones and zeros -> what attention scores get added, float32 [B, 1, 1, L]."""
    return (1 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min


def encode(
    config: Umt5Config, weights: Weights, buckets: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """Tokens and mask int64 [B, L] -> context float32 [B, L, d_model], zero where the mask is.

    Args:
        config: of the encoder.
        weights: by name; each is asked for when it is needed and then let go, so they may be read from disk.
        buckets: `buckets_by_offset(config)`.
        tokens: ids.
        mask: 1 for tokens, 0 for padding behind them.
    """
    places, pad = positions(tokens.shape[1], buckets), padding(mask)
    x = embed(weights, tokens)
    for i in range(config.num_layers):
        x = run_block(config, weights, f"blocks.{i}", x, places, pad)
    x = rms_norm(x, weights["norm"], config.layer_norm_epsilon)
    return torch.where(mask.unsqueeze(-1) > 0, x, torch.zeros(()))


class Umt5Part(nn.Module):
    """`encode` for export: tokens and mask, then the stored weights."""

    buckets: Tensor

    def __init__(self, config: Umt5Config, names: tuple[str, ...]) -> None:
        """`names` of the weights in the order in which they are given."""
        super().__init__()
        self.config, self.names = config, names
        self.register_buffer("buckets", buckets_by_offset(config))

    def forward(self, tokens: Tensor, mask: Tensor, *stored: Tensor) -> Tensor:
        weights = dict(zip(self.names, stored, strict=True))
        return encode(self.config, weights, self.buckets, tokens, mask)
