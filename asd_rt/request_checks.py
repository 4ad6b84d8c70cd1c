"""Whether an engine can serve a request, and whether this machine has the memory for it."""

from __future__ import annotations

import logging
from math import inf
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asd_rt.errors import ConfigError
from asd_rt.fitting import check_fits
from asd_rt.manifest import Manifest
from asd_rt.request import Request

FloatArray = NDArray[np.float32]
_log = logging.getLogger(__name__)


def check_memory(
    path: Path, manifest: Manifest, request: Request, joined: bool, dumped: bool = False
) -> None:
    """Refuse what this machine has not the memory for, and warn of what no student was trained for.

    Args:
        path: the engine.
        manifest: of it.
        request: for it.
        joined: passes may be joined.
        dumped: the cache is read in the end.

    Raises:
        ConfigError: it does not fit.
    """
    batch, frames, _, rows, columns = request.shape
    cache = manifest.cache
    held = frames or cache.window_frames
    check_fits(path, manifest, held, (rows, columns), batch, joined, dumped)
    every = request.refresh_every * cache.block_frames
    longest = min(every or inf, frames or inf)
    trained = manifest.checkpoint.get("trained_frames", longest)
    if longest > trained:
        _log.warning("%s: %s latent frames, but its student was trained on %d: later ones may drift",
                     path, frames or "endless", trained)  # fmt: skip


def latent_hw_of(path: Path, manifest: Manifest, asked: tuple[int, int] | None) -> tuple[int, int]:
    """The latent (rows, columns) of a video: what the engine is fixed to, or what is asked for.

    Raises:
        ConfigError: neither says, both differ, or no engine takes that size.
    """
    fixed = manifest.latent_hw
    if fixed is None and asked is None:
        raise ConfigError(
            f"{path}: fixes no latent size; build it with --latent-size HxW, or use asd-rt replay"
        )
    if fixed and asked and fixed != asked:
        raise ConfigError(
            f"{path}: is fixed to latents of {fixed[0]}x{fixed[1]}, found {asked[0]}x{asked[1]}"
        )
    rows, columns = fixed or asked or (0, 0)
    if rows < 2 or columns < 2 or rows % 2 or columns % 2:
        raise ConfigError(f"a latent size must be even, found {rows}x{columns}")
    return rows, columns


def noise_shape(
    path: Path, manifest: Manifest, noise: FloatArray
) -> tuple[int, int, int, int, int]:
    """Shape of the video that `noise` stands for.

    Raises:
        ConfigError: it is not one of this engine's.
    """
    channels = manifest.model.in_dim
    if noise.ndim != 5 or 0 in noise.shape or noise.shape[2] != channels:
        raise ConfigError(f"noise must be [B, F, {channels}, h, w], found {list(noise.shape)}")
    batch, frames, _, rows, columns = noise.shape
    return (batch, frames, channels, *latent_hw_of(path, manifest, (rows, columns)))


def check_context(manifest: Manifest, context: FloatArray) -> None:
    """Refuse an embedding that the engine's network does not read.

    Raises:
        ConfigError: another shape than [B, tokens <= text_len, text_dim].
    """
    model = manifest.model
    good = context.ndim == 3 and 0 not in context.shape and context.shape[2] == model.text_dim
    if not good or context.shape[1] > model.text_len:
        raise ConfigError(
            f"context must be [B, tokens <= {model.text_len}, {model.text_dim}], found "
            f"{list(context.shape)}"
        )
