"""An engine on an NVIDIA card, whatever runs its parts: TensorRT or ONNX Runtime.

Passes and what serves them share one stream; the codec has its own, so that a block is decoded while its
cache pass runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import Denoiser, FloatArray
from asd_rt.backends.cuda import Binding, Cuda
from asd_rt.backends.device_codec import DeviceCodecStream
from asd_rt.backends.device_denoiser import DeviceDenoiser
from asd_rt.backends.device_memory import DeviceArray
from asd_rt.backends.device_queue import DeviceQueue
from asd_rt.decoding import Decoder
from asd_rt.errors import BackendError
from asd_rt.manifest import Manifest, part_path
from asd_rt.manifest_schema import CODEC_GRAPHS

RELEASE_BYTES = 1 << 30  # of a text encoder; a larger one is released after each prompt


class DeviceContext(Protocol):
    """A part with tensors bound to it; it runs any number of times."""

    def set_inputs(self, inputs: Mapping[str, Binding]) -> None:
        """Bind inputs by address and shape."""

    def set_outputs(self, outputs: Mapping[str, int]) -> None:
        """Bind outputs by address, once all inputs are bound."""

    def shape_of(self, output: str) -> tuple[int, ...]:
        """Shape of an output, once all inputs are bound."""

    def run(self) -> None:
        """Queue one run."""

    def replay(self) -> None:
        """Queue a run with the tensors of the last."""

    def release(self) -> None:
        """Let go of what replays need, after everything queued has run."""


class DevicePart(Protocol):
    """One part of an engine, loaded."""

    @property
    def usual(self) -> DeviceContext:
        """The context of runs whose tensors change from run to run."""

    def new_context(self) -> DeviceContext:
        """A context for one size of pass."""

    def release(self) -> None:
        """Free its memory, after everything queued has run; it and its contexts are of no use afterwards."""


class DeviceEngine(ABC):
    """All parts of an engine; see `asd_rt.backends.base.Engine`."""

    def __init__(self, path: Path, manifest: Manifest, cuda: Cuda, device: str) -> None:
        self.path, self.manifest, self.cuda, self.device = path, manifest, cuda, device
        self._parts: dict[str, DevicePart] = {}
        self._streams: dict[tuple[str, tuple[int, int]], DeviceCodecStream] = {}
        self._closed = False
        self.denoiser = DeviceDenoiser(self)

    @abstractmethod
    def _load(self, name: str, file: Path, stream: Any) -> DevicePart:
        """The part `name`, which lies in `file`, to run on `stream`."""

    def part(self, name: str) -> DevicePart:
        """The part `name`, loaded once."""
        if self._closed:
            raise BackendError(f"{self.path}: the engine is closed; open it again with asd_rt.open")
        if name not in self._parts:
            stream = self.cuda.codec_stream if name in CODEC_GRAPHS else self.cuda.stream
            file = part_path(self.path, self.manifest, name)
            self._parts[name] = self._load(name, file, stream)
        return self._parts[name]

    def new_denoiser(self) -> DeviceDenoiser:
        """Another denoiser over the same parts, with a KV cache of its own; the caller releases it."""
        return DeviceDenoiser(self)

    def _run_host(self, name: str, target: str, **arrays: NDArray[Any]) -> FloatArray:
        """Run a part with one output, whose tensors live on the host."""
        context, made = self.part(name).usual, DeviceArray(self.cuda)
        given = {source: DeviceArray(self.cuda) for source in arrays}
        try:
            context.set_inputs({source: given[source].put(x) for source, x in arrays.items()})
            result = np.empty(context.shape_of(target), np.float32)
            address = made.room(result.nbytes)
            context.set_outputs({target: address})
            context.run()
            self.cuda.download(result, address)
        finally:
            for buffer in (made, *given.values()):
                buffer.release()
        return result

    def encode_prompt(self, tokens: NDArray[np.int64]) -> FloatArray:
        part = self.manifest.parts.get("text")
        if part is None or "mask" not in part.inputs:
            return self._run_host("text", "context", tokens=tokens)
        context = self._run_host("text", "context", tokens=tokens, mask=np.ones_like(tokens))
        if (
            part.bytes > RELEASE_BYTES
        ):  # it runs once a prompt, and the card has other uses for its memory
            self._parts.pop("text").release()
        return context

    def codec_stream(self, part: str, latent_hw: tuple[int, int]) -> DeviceCodecStream:
        key = (part, latent_hw)
        if key not in self._streams:
            self._streams[key] = self.new_codec_stream(part, latent_hw)
        return self._streams[key]

    def new_codec_stream(self, part: str, latent_hw: tuple[int, int]) -> DeviceCodecStream:
        """As `codec_stream`, but with feature caches of its own; the caller releases it."""
        part_path(self.path, self.manifest, part)  # raises where there is none
        return DeviceCodecStream(self, part, latent_hw)

    def block_queue(self, decoder: Decoder, denoiser: Denoiser | None = None) -> DeviceQueue | None:
        """See `asd_rt.backends.overlap.OverlappingEngine`; engines built before there was one have none."""
        own, stream = denoiser or self.denoiser, decoder.stream
        if "step" not in self.manifest.parts or not isinstance(own, DeviceDenoiser):
            return None
        if not isinstance(stream, DeviceCodecStream):
            return None
        queue = own.queue(stream)
        queue.begin(decoder)
        return queue

    def close(self) -> None:
        """Release everything, after a failed pass too."""
        if self._closed:
            return
        self._closed = True
        try:
            self.cuda.close()  # graphs before the contexts that they were captured from
        finally:
            self._streams.clear()
            self._parts.clear()
