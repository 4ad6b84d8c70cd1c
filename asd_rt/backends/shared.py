"""One opened engine for several videos: everything is shared but the denoiser with its KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import CodecStream, Denoiser, Engine, FloatArray
from asd_rt.manifest import Manifest


class OwnDenoiser(Denoiser, Protocol):
    """A denoiser that is not its engine's only one."""

    def release(self) -> None:
        """Free all memory; the denoiser is of no use afterwards."""


@runtime_checkable
class SharableEngine(Engine, Protocol):
    """An engine that can serve several videos, as those that are opened from files can."""

    def new_denoiser(self) -> OwnDenoiser:
        """Another denoiser over the same weights, with a KV cache of its own; the caller releases it."""


class SharedEngine:
    """See `asd_rt.backends.base.Engine`: `engine` with another denoiser.

    Parts hold no state between calls, so videos may take turns; a codec's features are its stream's.
    """

    def __init__(self, engine: SharableEngine) -> None:
        self._engine = engine
        self._denoiser = engine.new_denoiser()

    @property
    def path(self) -> Path:
        return self._engine.path

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    @property
    def denoiser(self) -> Denoiser:
        return self._denoiser

    @property
    def device(self) -> str:
        return self._engine.device

    def new_denoiser(self) -> OwnDenoiser:
        return self._engine.new_denoiser()

    def encode_prompt(self, tokens: NDArray[np.int64]) -> FloatArray:
        return self._engine.encode_prompt(tokens)

    def codec_stream(self, part: str, latent_hw: tuple[int, int]) -> CodecStream:
        return self._engine.codec_stream(part, latent_hw)

    def close(self) -> None:
        """Release this denoiser only; the engine goes on."""
        self._denoiser.release()
