"""Prompts and latents as the student meets them, to measure and to calibrate with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from asd_rt.backends.base import FloatArray
from asd_rt.manifest import Manifest
from asd_rt.plan import Plan
from asd_rt.planner import is_large
from asd_rt.session import Session
from export.reference import TorchEngine
from train.checkpoint import Checkpoint
from train.model import WanModel
from train.tiny_world import label_tokens, random_labels, vocabulary

FREE_LATENT_SIZES = ((4, 6), (6, 4))  # tried where an engine fixes no size
MAX_ROLLOUT_BLOCKS = 8


def latent_sizes(manifest: Manifest) -> tuple[tuple[int, int], ...]:
    """Latent sizes to measure an engine at."""
    if manifest.latent_hw is not None:
        return (manifest.latent_hw,)
    return FREE_LATENT_SIZES[:1] if is_large(manifest.model) else FREE_LATENT_SIZES


def rollout_frames(manifest: Manifest) -> int:
    """Frames of a rollout: past the end of the window where that is affordable, three blocks without one.

    Two blocks of a large network.
    """
    cache = manifest.cache
    block = cache.block_frames
    blocks = -(-cache.window_frames // block) + 2 if cache.window_frames else 3
    blocks = min(blocks, 2 if is_large(manifest.model) else MAX_ROLLOUT_BLOCKS)
    if cache.max_frames and not cache.window_frames:
        blocks = min(blocks, cache.max_frames // block)
    return blocks * block


def sample_context(checkpoint: Checkpoint, batch: int, seed: int) -> Tensor:
    """Contexts [batch, text_len, text_dim]: prompts where the student reads words, else noise."""
    config, draw = checkpoint.config, torch.Generator().manual_seed(seed)
    if checkpoint.table is not None:
        size = (batch, config.text_len)
        tokens = torch.randint(len(checkpoint.table), size, generator=draw)
        if checkpoint.deployment.words == vocabulary():
            tokens = label_tokens(random_labels(batch, draw), config.text_len)
        return checkpoint.table[tokens]
    return torch.randn((batch, config.text_len, config.text_dim), generator=draw)


def sample_noise(
    manifest: Manifest, latent_hw: tuple[int, int], batch: int, seed: int
) -> FloatArray:
    """Noise of a rollout, float32 [batch, F, C, h, w]."""
    shape = (batch, rollout_frames(manifest), manifest.model.in_dim, *latent_hw)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def sample_latents(
    checkpoint: Checkpoint,
    model: WanModel,
    manifest: Manifest,
    latent_hw: tuple[int, int],
    plan: Plan,
    seed: int,
) -> Tensor:
    """Clean latents [1, F, C, h, w] of a video that the student makes in float32."""
    session = Session(TorchEngine(checkpoint, manifest, model), join=False)
    noise = sample_noise(manifest, latent_hw, 1, seed)
    context = sample_context(checkpoint, 1, seed).numpy()
    return torch.from_numpy(session.replay(noise, context, plan=plan).latents)
