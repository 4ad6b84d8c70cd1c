"""What a frame loop is asked for, and whether its arrays fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import ConfigError
from asd_rt.plan import Plan

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Request:
    """One video to generate.

    Attributes:
        context: text embedding, float32 [B, tokens <= text_len, text_dim].
        shape: of the whole video's latents, initial frames included: (B, F, C, h, w); F is a multiple of
            the block size, or 0: endless.
        plan: denoising steps of each generated block.
        seed: of all noise that is not given.
        noise: None or float32 of `shape`; frames under `initial` are not used.
        renoise: {(block, step): float32 [B, block_frames, C, h, w]}: fresh noise after step `step` of
            block `block`; what is missing is drawn from `seed`. Blocks count from the first initial one.
        initial: None or clean latents [B, whole blocks, C, h, w] that only fill the cache.
        commit_last: run the last block's cache pass too (to read the cache, or to go on from it).
        refresh_every: generated blocks after which the cache starts over; 0 = never.
    """

    context: FloatArray
    shape: tuple[int, int, int, int, int]
    plan: Plan
    seed: int = 0
    noise: FloatArray | None = None
    renoise: Mapping[tuple[int, int], FloatArray] = field(default_factory=dict)
    initial: FloatArray | None = None
    commit_last: bool = False
    refresh_every: int = 0


def pad_context(context: FloatArray, text_len: int) -> FloatArray:
    """`context` [B, tokens, text_dim] zero-padded to [B, text_len, text_dim].

    Raises:
        ConfigError: more tokens than the network takes.
    """
    tokens = context.shape[1]
    if tokens > text_len:
        raise ConfigError(f"context has {tokens} tokens, this engine takes at most {text_len}")
    return np.pad(context.astype(np.float32, copy=False), ((0, 0), (0, text_len - tokens), (0, 0)))


def check_request(request: Request, block_frames: int) -> None:
    """Shapes of a request fit each other; which engine takes them is the session's question."""
    batch, frames, *rest = request.shape
    initial = request.initial
    if initial is not None:
        given = initial.shape[1] if initial.ndim == 5 else 0
        if (
            initial.shape != (batch, given, *rest)
            or given % block_frames
            or not 0 < given <= (frames or given)
        ):
            raise ConfigError(
                f"initial must be [{batch}, whole blocks of {block_frames} up to {frames}, "
                f"{', '.join(map(str, rest))}], found {list(initial.shape)}"
            )
    if frames < 0 or frames % block_frames:
        raise ConfigError(
            f"{frames} latent frames are not a whole number of blocks of {block_frames}"
        )
    if request.context.ndim != 3 or request.context.shape[0] != batch:
        raise ConfigError(
            f"context must be [{batch}, tokens, text_dim], found {list(request.context.shape)}"
        )
    if request.noise is not None and request.noise.shape != request.shape:
        raise ConfigError(f"noise must be {list(request.shape)}, found {list(request.noise.shape)}")
    expected = (batch, block_frames, *rest)
    for (block, step), noise in request.renoise.items():
        if noise.shape != expected:
            raise ConfigError(
                f"renoise.block{block}.step{step} must be {list(expected)}, found {list(noise.shape)}"
            )
