"""A codec part on a card: two sets of feature caches on the device that swap roles after each step.

TensorRT promises nothing where an input and an output share memory, so new caches go into the other set.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from asd_rt.backends.base import FloatArray
from asd_rt.backends.cuda import Binding
from asd_rt.backends.device_memory import DeviceArray
from asd_rt.decoding import NEW, SIDES, STATE, frame_size, resolve_shape

if TYPE_CHECKING:
    from asd_rt.backends.device import DeviceEngine


class DeviceCodecStream:
    """See `asd_rt.backends.base.CodecStream`."""

    def __init__(self, engine: DeviceEngine, part: str, latent_hw: tuple[int, int]) -> None:
        """The stream of `part` ("decoder" or "encoder")."""
        self._engine, self._part = engine, part
        self._input, self._output = SIDES[part]
        self.frame_hw = frame_size(engine.manifest, part, latent_hw)
        sizes = dict(zip("hw", latent_hw, strict=True))
        self._specs = {
            name: (resolve_shape(spec, sizes), np.dtype(spec.dtype).itemsize)
            for name, spec in engine.manifest.parts[part].inputs.items()
            if name.startswith(STATE)
        }
        cuda = engine.cuda

        def buffer() -> DeviceArray:
            return DeviceArray(cuda, cuda.codec_stream)

        self._given, self._made = buffer(), buffer()
        self._old = {name: buffer() for name in self._specs}
        self._new = {name: buffer() for name in self._specs}

    def step(self, given: FloatArray, made: FloatArray, first: bool) -> None:
        cuda = self._engine.cuda
        address = self._run(self._given.put(given), made.nbytes, first)
        cuda.download(made, address, cuda.codec_stream)

    def queue(self, given: Binding, target: int, size_bytes: int, first: bool) -> None:
        """Queue a step.

        Args:
            given: on the device; its contents must stay until the step has run.
            target: pinned host memory that what is made is copied to.
            size_bytes: of what is made.
            first: as in `step`.
        """
        cuda = self._engine.cuda
        cuda.fetch(target, self._run(given, size_bytes, first), size_bytes, cuda.codec_stream)

    def _run(self, given: Binding, size_bytes: int, first: bool) -> int:
        """Queue a step; returns where on the device its result will be."""
        part = self._engine.part(f"{self._part}_first" if first else self._part).usual
        inputs: dict[str, Binding] = {self._input: given}
        outputs = {self._output: self._made.room(size_bytes)}
        for name, (shape, width) in self._specs.items():
            if not first:
                inputs[name] = (self._old[name].room(prod(shape) * width), shape)
            outputs[NEW + name] = self._new[name].room(prod(shape) * width)
        part.set_inputs(inputs)
        part.set_outputs(outputs)
        part.run()
        self._old, self._new = self._new, self._old
        return outputs[self._output]

    def release(self) -> None:
        """Free all memory; the stream is of no use afterwards."""
        if self._engine.cuda.closed:  # which freed it
            return
        for buffer in (self._given, self._made, *self._old.values(), *self._new.values()):
            buffer.release()
