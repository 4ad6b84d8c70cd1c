"""The tiny world's parts around the denoiser: a linear latent codec and a vocabulary text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.tiny_world import BACKGROUND, CANVAS, WORDS, TinyWorld, vocabulary

if TYPE_CHECKING:
    from train.checkpoint import Checkpoint

PATCH = 4
LATENT_HW = (CANVAS // PATCH, CANVAS // PATCH)


def is_tiny_world(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint makes videos that the judge knows."""
    told = checkpoint.deployment
    return (
        told.words == vocabulary()
        and told.latent_hw == LATENT_HW
        and checkpoint.table is not None
        and checkpoint.codec is not None
    )


class LinearCodec(nn.Module):
    """Space-to-depth by 4, then a fixed linear map 48 -> `channels` fitted to real frames.

    The map is a principal-component basis, each component divided by the square root of its standard
    deviation ("half-whitened": fine detail counts more than in pixels, noise less than in full whitening)
    and all scaled to a mean square of 1. An empty patch is the zero latent.
    """

    encoder: Tensor
    decoder: Tensor
    ground: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("encoder", torch.zeros(channels, 3 * PATCH * PATCH))
        self.register_buffer("decoder", torch.zeros(3 * PATCH * PATCH, channels))
        self.register_buffer("ground", torch.tensor(BACKGROUND).repeat_interleave(PATCH * PATCH))

    def fit(self, world: TinyWorld, seed: int) -> float:
        """Fit the basis to frames of `world`; returns the share of variance that it loses."""
        frames = world.draw(2000, 2, torch.Generator().manual_seed(seed)).frames
        x = (self._patches(frames).flatten(0, -2) - self.ground).double()
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        vectors = vectors * torch.sign(vectors.sum(dim=0))
        kept, basis = values[: self.channels], vectors[:, : self.channels]
        scale = kept.sqrt().rsqrt()
        scale = scale / (scale * scale * kept).mean().sqrt()
        self.encoder.copy_((basis * scale).T)
        self.decoder.copy_(basis / scale)
        return float(1 - kept.sum() / values.sum())

    @staticmethod
    def _patches(frames: Tensor) -> Tensor:
        """[B, F, 3, H, W] -> [B, F, H/4, W/4, 48]."""
        x = frames.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))  # B F 3 h 4 w 4
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(-3)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, F, 3, H, W] in 0..1 -> latents [B, F, channels, H/4, W/4]."""
        latents = (self._patches(frames) - self.ground) @ self.encoder.T
        return latents.permute(0, 1, 4, 2, 3)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B, F, channels, h, w] -> frames [B, F, 3, 4h, 4w] in -1..1 (unclamped)."""
        batch, count, _, height, width = latents.shape
        pixels = F.linear(latents.permute(0, 1, 3, 4, 2), self.decoder, self.ground) * 2 - 1
        pixels = pixels.view(batch, count, height, width, 3, PATCH, PATCH).permute(
            0, 1, 4, 2, 5, 3, 6
        )
        return pixels.reshape(batch, count, 3, height * PATCH, width * PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> frames [B, F, 3, H, W] in 0..1."""
        return ((self(latents) + 1) / 2).clamp(0, 1)


class VocabularyEncoder(nn.Module):
    """One fixed random vector of unit-variance entries a word; token 0 is the zero vector."""

    table: Tensor

    def __init__(self, text_dim: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(len(WORDS) + 1, text_dim, generator=generator)
        table[0] = 0
        self.register_buffer("table", table)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [B, text_len] -> context [B, text_len, text_dim]."""
        return self.table[tokens]
