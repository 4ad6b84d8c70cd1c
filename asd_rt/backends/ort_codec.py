"""A codec part in ONNX Runtime: a step whose feature caches stay in one set of buffers.

A cache goes in and comes out by the same memory. That is safe because of how the graphs are made
(docs/engine.md): the new cache is cut from the old one joined with the step's input, so it cannot be written
before the old one has been read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import FloatArray
from asd_rt.backends.ort_denoiser import run_errors
from asd_rt.decoding import NEW, SIDES, STATE, frame_size, resolve_shape
from asd_rt.errors import BackendError
from asd_rt.manifest import Manifest


class OrtCodecStream:
    """See `asd_rt.backends.base.CodecStream`."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        part: str,
        latent_hw: tuple[int, int],
        session: Callable[[str], Any],
    ) -> None:
        """The stream of `part` ("decoder" or "encoder") of the engine at `path`; `session`: of a part."""
        self._where, self._part, self._session = f"{path}: {part}", part, session
        self._spec = manifest.parts[part]
        self._given, self._made = SIDES[part]
        self.frame_hw = frame_size(manifest, part, latent_hw)
        self._sizes = dict(zip("hw", latent_hw, strict=True))
        self._states: dict[str, NDArray[Any]] | None = None

    def step(self, given: FloatArray, made: FloatArray, first: bool) -> None:
        if self._states is None:
            self._states = self._allocate()
        session = self._session(f"{self._part}_first" if first else self._part)
        binding = session.io_binding()
        _bind(binding.bind_input, self._given, given)
        _bind(binding.bind_output, self._made, made)
        for name, buffer in self._states.items():
            if not first:
                _bind(binding.bind_input, name, buffer)
            _bind(binding.bind_output, NEW + name, buffer)
        with run_errors(self._where):
            session.run_with_iobinding(binding)

    def release(self) -> None:
        """Free all memory; the stream is of no use afterwards."""
        self._states = None

    def _allocate(self) -> dict[str, NDArray[Any]]:
        shapes = {
            name: (resolve_shape(spec, self._sizes), spec.dtype)
            for name, spec in self._spec.inputs.items()
            if name.startswith(STATE)
        }
        try:
            return {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        except MemoryError as error:
            size = sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in shapes.values())
            raise BackendError(
                f"{self._where}: its feature caches need {size} bytes, more than there is; ask for smaller "
                "frames, build it with --vae-precision fp16, or with a TAEHV as --vae"
            ) from error


def _bind(bind: Callable[..., None], name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
