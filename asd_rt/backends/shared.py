"""One opened engine for several videos: all is shared but the denoiser and the codec's feature caches."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import CodecStream, Denoiser, Engine, FloatArray
from asd_rt.backends.overlap import BlockQueue, OverlappingEngine
from asd_rt.decoding import Decoder
from asd_rt.manifest import Manifest


class OwnDenoiser(Denoiser, Protocol):
    """A denoiser that is not its engine's only one."""

    def release(self) -> None:
        """Free all memory; the denoiser is of no use afterwards."""


class OwnCodecStream(CodecStream, Protocol):
    """A codec stream that is not its engine's only one of this kind."""

    def release(self) -> None:
        """Free all memory; the stream is of no use afterwards."""


@runtime_checkable
class SharableEngine(Engine, Protocol):
    """An engine that can serve several videos, as those that are opened from files can."""

    def new_denoiser(self) -> OwnDenoiser:
        """Another denoiser over the same weights, with a KV cache of its own; the caller releases it."""

    def new_codec_stream(self, part: str, latent_hw: tuple[int, int]) -> OwnCodecStream:
        """As `codec_stream`, with feature caches of its own; the caller releases it."""


class SharedEngine:
    """See `asd_rt.backends.base.Engine`: `engine` with another denoiser.

    Parts hold no state between calls, so videos may take turns.
    """

    def __init__(self, engine: SharableEngine) -> None:
        self._engine = engine
        self._denoiser = engine.new_denoiser()
        self._streams: dict[tuple[str, tuple[int, int]], OwnCodecStream] = {}

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
        key = (part, latent_hw)
        if key not in self._streams:
            self._streams[key] = self.new_codec_stream(part, latent_hw)
        return self._streams[key]

    def new_codec_stream(self, part: str, latent_hw: tuple[int, int]) -> OwnCodecStream:
        return self._engine.new_codec_stream(part, latent_hw)

    def block_queue(self, decoder: Decoder, denoiser: Denoiser | None = None) -> BlockQueue | None:
        if not isinstance(self._engine, OverlappingEngine):
            return None
        return self._engine.block_queue(decoder, denoiser or self._denoiser)

    def close(self) -> None:
        """Release what is this video's only; the engine goes on."""
        self._denoiser.release()
        for stream in self._streams.values():
            stream.release()
        self._streams.clear()
