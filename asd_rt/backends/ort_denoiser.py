"""The denoiser in ONNX Runtime: static buffers, and a cache prefix that is bound, never copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import FloatArray
from asd_rt.errors import BackendError, EngineError
from asd_rt.kv_cache import Move
from asd_rt.manifest import REBUILD, Manifest, manifest_path
from asd_rt.rope import rope_table

_KV_DTYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}


@contextmanager
def run_errors(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's own exceptions, which share no base class, into ours."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (
        state.Fail,
        state.InvalidArgument,
        state.RuntimeException,
        state.NotImplemented,
        state.EPFail,
    )
    try:
        yield
    except kinds as error:
        first_line = str(error).strip().splitlines()[0]
        raise BackendError(f"{what}: ONNX Runtime failed: {first_line}") from error


class OrtDenoiser:
    """See `asd_rt.backends.base.Denoiser`.

    Buffers are numpy arrays that live as long as the geometry does; the session reads and writes them
    through an IO binding by address. Names are bound again only when what they point to changes.
    """

    _geometry: (
        tuple[int, int, int, int] | None
    )  # batch, latent rows, latent columns, capacity frames
    _bound_block: tuple[range, int] | None
    _bound_time: tuple[float, int] | None
    _binding: Any
    _keys: list[NDArray[Any]]
    _values: list[NDArray[Any]]
    _prompt: dict[str, NDArray[Any]]

    def __init__(self, path: Path, manifest: Manifest, session: Callable[[str], Any]) -> None:
        """The denoiser of the engine at `path`; `session` gives the onnxruntime session of a part."""
        self._path = path
        self._model = manifest.model
        self._spec = manifest.parts["denoiser"]
        self._part_session = session
        spec = self._spec.outputs.get("new_k.0")
        dtype = spec.dtype if spec else "none"
        if dtype not in _KV_DTYPES:
            raise EngineError(
                f"{manifest_path(path)}: new_k.0 of the denoiser must be {' or '.join(_KV_DTYPES)} for "
                f"ONNX Runtime, found {dtype}; build an fp32 engine: {REBUILD} --precision fp32"
            )
        self._kv_dtype = _KV_DTYPES[dtype]
        self._session: Any = session("denoiser")
        self._layers = range(manifest.model.num_layers)
        self._times: dict[tuple[float, int], tuple[FloatArray, FloatArray]] = {}
        self._release_buffers()

    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        rows, columns = latent_hw
        self._prompt = {}
        self._bound_block = None
        if self._geometry == (batch, rows, columns, capacity_frames):
            return
        self._check_fixed("latents", {0: batch, 3: rows, 4: columns})
        model = self._model
        self._frame_tokens = (rows // 2) * (columns // 2)
        shape = (capacity_frames * self._frame_tokens, batch, model.num_heads, model.head_dim)
        self._release_buffers()
        try:
            self._keys = [np.zeros(shape, self._kv_dtype) for _ in self._layers]
            self._values = [np.zeros(shape, self._kv_dtype) for _ in self._layers]
        except MemoryError as error:
            size = 2 * len(self._layers) * int(np.prod(shape)) * np.dtype(self._kv_dtype).itemsize
            raise BackendError(
                f"a KV cache of {capacity_frames} frames needs {size} bytes, more than there is; ask for "
                "fewer frames, or build the engine with --window-frames"
            ) from error
        self._binding = self._session.io_binding()
        self._latents = np.zeros((batch, 0, model.in_dim, rows, columns), np.float32)
        self._geometry = (batch, rows, columns, capacity_frames)

    def _check_fixed(self, tensor: str, sizes: Mapping[int, int]) -> None:
        shape = self._spec.inputs[tensor].shape
        for axis, size in sizes.items():
            expected = shape[axis] if axis < len(shape) else "none"
            if isinstance(expected, int) and expected != size:
                raise BackendError(
                    f"{self._path}: axis {axis} of {tensor} is fixed to {expected}, found {size}; "
                    "this engine serves no other size"
                )

    def set_prompt(self, context: FloatArray) -> None:
        session = self._part_session("prompt")
        names = [f"prompt_{kind}.{i}" for i in self._layers for kind in "kv"]
        with run_errors(f"{self._path}: prompt"):
            results = session.run(names, {"context": np.ascontiguousarray(context, np.float32)})
        # Kept: the binding only holds addresses.
        self._prompt = {
            name: np.ascontiguousarray(r) for name, r in zip(names, results, strict=True)
        }
        for name, array in self._prompt.items():
            self._bind_input(name, array)

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        if self._geometry is None or not self._prompt:
            raise BackendError("denoise needs prepare and set_prompt first")
        if (frames, past_frames) != self._bound_block:
            self._bind_block(frames, past_frames)
        if (timestep, len(frames)) != self._bound_time:
            self._bind_time(timestep, len(frames))
        np.copyto(self._latents, latents)
        with run_errors(f"{self._path}: denoiser"):
            self._session.run_with_iobinding(self._binding)
        return self._flow

    def _bind_block(self, frames: range, past_frames: int) -> None:
        """Bind what stays the same for all passes of a block: positions, cache prefix, outputs."""
        batch, rows, columns, capacity_frames = self._geometry or (0, 0, 0, 0)
        if past_frames + len(frames) > capacity_frames:
            raise BackendError(
                f"a pass over {len(frames)} frames behind {past_frames} does not fit into "
                f"{capacity_frames} slots"
            )
        model = self._model
        if self._latents.shape[1] != len(frames):
            self._latents = np.zeros((batch, len(frames), model.in_dim, rows, columns), np.float32)
            self._flow = np.zeros((batch, len(frames), model.out_dim, rows, columns), np.float32)
            self._bind_input("latents", self._latents)
            self._bind_output("flow", self._flow)
        self._rope = rope_table(model.head_dim, frames, rows // 2, columns // 2)
        self._bind_input("rope_cos", self._rope[0])
        self._bind_input("rope_sin", self._rope[1])
        past = past_frames * self._frame_tokens
        end = past + len(frames) * self._frame_tokens
        for i in self._layers:
            for kind, buffer in (("k", self._keys[i]), ("v", self._values[i])):
                self._bind_input(f"past_{kind}.{i}", buffer[:past])
                self._bind_output(f"new_{kind}.{i}", buffer[past:end])
        self._bound_block = (frames, past_frames)

    def _bind_time(self, timestep: float, count: int) -> None:
        key = (timestep, count)
        if key not in self._times:
            session = self._part_session("time")
            feed = {"timesteps": np.full((1, count), timestep, np.float32)}
            with run_errors(f"{self._path}: time"):
                embedding, modulation = session.run(["time_embedding", "time_modulation"], feed)
            self._times[key] = (np.ascontiguousarray(embedding), np.ascontiguousarray(modulation))
        embedding, modulation = self._times[key]
        self._bind_input("time_embedding", embedding)
        self._bind_input("time_modulation", modulation)
        self._bound_time = key

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def move(self, moves: Sequence[Move]) -> None:
        size = self._frame_tokens
        for move in moves:
            source = slice(move.source * size, (move.source + move.frames) * size)
            target = slice(move.target * size, (move.target + move.frames) * size)
            for buffer in (*self._keys, *self._values):
                buffer[target] = buffer[source]

    def read_cache(self, layer: int, slots: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        tokens = np.concatenate(
            [
                np.arange(slot * self._frame_tokens, (slot + 1) * self._frame_tokens)
                for slot in slots
            ]
        )
        keys, values = (
            np.ascontiguousarray(buffer[tokens].swapaxes(0, 1), np.float32)
            for buffer in (self._keys[layer], self._values[layer])
        )
        return keys, values

    def _release_buffers(self) -> None:
        """Drop the old buffers first, so that a larger cache need not fit beside a smaller one."""
        self._geometry = self._bound_block = self._bound_time = self._binding = None
        self._keys, self._values, self._prompt = [], [], {}

    def release(self) -> None:
        """Free all memory; the denoiser is of no use afterwards."""
        self._release_buffers()
        self._times.clear()
        self._session = None
