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
from asd_rt.kv_cache import Move, joined_mask
from asd_rt.manifest import REBUILD, Manifest, manifest_path
from asd_rt.rope import rope_table

MAX_PASSES = 16  # bindings that are kept
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


class _Pass:
    """One graph at one size, with everything bound once: a run copies inputs in and takes nothing else.

    Attributes:
        inputs: static buffers of the inputs that change from pass to pass.
        flow: static buffer of the result.
        holds: what was last copied into an input, so that it is not copied again.
    """

    def __init__(self, session: Any, inputs: Mapping[str, tuple[int, ...]], flow: tuple[int, ...]):
        self._session = session
        self._binding = session.io_binding()
        self.inputs: dict[str, NDArray[Any]] = {
            name: np.zeros(shape, np.bool_ if name == "mask" else np.float32)
            for name, shape in inputs.items()
        }
        self.flow = np.zeros(flow, np.float32)
        self.holds: dict[str, object] = {}
        for name, array in self.inputs.items():
            self.bind_input(name, array)
        self.bind_output("flow", self.flow)

    def put(self, name: str, key: object, make: Callable[[], NDArray[Any]]) -> None:
        """Fill an input with `make()`, unless it holds `key` already."""
        if self.holds.get(name) != key:
            np.copyto(self.inputs[name], make())
            self.holds[name] = key

    def bind_input(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def bind_output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


class OrtDenoiser:
    """See `asd_rt.backends.base.Denoiser`.

    Buffers are numpy arrays that live as long as the geometry does; sessions read and write them through IO
    bindings by address. A full window never changes shape, so from then on one binding serves all passes.
    """

    _geometry: (
        tuple[int, int, int, int] | None
    )  # batch, latent rows, latent columns, capacity frames
    _rope: tuple[range, tuple[FloatArray, FloatArray]] | None
    _passes: dict[tuple[str, int, int], _Pass]
    _cache: dict[str, NDArray[Any]]
    _prompt: dict[str, NDArray[Any]]

    def __init__(self, path: Path, manifest: Manifest, session: Callable[..., Any]) -> None:
        """The denoiser of the engine at `path`; `session`: of a part, for certain sizes."""
        self._path = path
        self._model = manifest.model
        self._spec = manifest.parts["denoiser"]
        self._part_session = session
        self.can_join = "joined" in manifest.parts
        spec = self._spec.outputs.get("new_k.0")
        dtype = spec.dtype if spec else "none"
        if dtype not in _KV_DTYPES:
            raise EngineError(
                f"{manifest_path(path)}: new_k.0 of the denoiser must be {' or '.join(_KV_DTYPES)} for "
                f"ONNX Runtime, found {dtype}; build an fp32 engine: {REBUILD} --precision fp32"
            )
        self._kv_dtype = _KV_DTYPES[dtype]
        self._layers = range(manifest.model.num_layers)
        self._modulations: dict[tuple[float, int], FloatArray] = {}
        self._release_buffers()

    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        rows, columns = latent_hw
        self._has_prompt = False
        if self._geometry == (batch, rows, columns, capacity_frames):
            return
        self._check_fixed("latents", {0: batch, 3: rows, 4: columns})
        model = self._model
        self._frame_tokens = (rows // 2) * (columns // 2)
        token = (batch, model.num_heads, model.head_dim)
        shape = (capacity_frames * self._frame_tokens, *token)
        self._release_buffers()
        names = [f"{kind}.{i}" for i in self._layers for kind in "kv"]
        try:
            self._cache = {name: np.zeros(shape, self._kv_dtype) for name in names}
        except MemoryError as error:
            size = len(names) * int(np.prod(shape)) * np.dtype(self._kv_dtype).itemsize
            raise BackendError(
                f"a KV cache of {capacity_frames} frames needs {size} bytes, more than there is; ask for "
                "fewer frames, or build the engine with --window-frames"
            ) from error
        self._prompt = {
            f"prompt_{name}": np.zeros((model.text_len, *token), self._kv_dtype) for name in names
        }
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
        with run_errors(f"{self._path}: prompt"):
            results = session.run(
                list(self._prompt), {"context": np.ascontiguousarray(context, np.float32)}
            )
        for buffer, result in zip(self._prompt.values(), results, strict=True):
            np.copyto(buffer, result)
        self._has_prompt = True

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        one = self._pass("denoiser", frames, past_frames)
        one.put("modulation", timestep, lambda: self._modulation(timestep, len(frames)))
        np.copyto(one.inputs["latents"], latents)
        return self._run("denoiser", one)

    def denoise_joined(
        self,
        clean: FloatArray,
        noisy: FloatArray,
        timestep: float,
        frames: range,
        past_frames: int,
        hidden: Sequence[int],
    ) -> FloatArray:
        if not self.can_join:
            raise BackendError(f"{self._path}: has no joined part; build it again with: {REBUILD}")
        one, size = self._pass("joined", frames, past_frames), len(frames) // 2
        one.put(
            "modulation",
            timestep,
            lambda: np.concatenate([self._modulation(t, size) for t in (0.0, timestep)], axis=1),
        )
        one.put(
            "mask",
            tuple(hidden),
            lambda: joined_mask(size, past_frames, hidden, self._frame_tokens),
        )
        np.copyto(one.inputs["latents"][:, :size], clean)
        np.copyto(one.inputs["latents"][:, size:], noisy)
        return self._run("joined", one)[:, size:]

    def _run(self, part: str, one: _Pass) -> FloatArray:
        with run_errors(f"{self._path}: {part}"):
            one.run()
        return one.flow

    def _pass(self, part: str, frames: range, past_frames: int) -> _Pass:
        """The pass of this size, with positions in place."""
        if self._geometry is None or not self._has_prompt:
            raise BackendError("denoise needs prepare and set_prompt first")
        key = (part, len(frames), past_frames)
        if key not in self._passes:
            if len(self._passes) >= MAX_PASSES:  # a video without a window meets each size once
                del self._passes[next(iter(self._passes))]
            self._passes[key] = self._bind(*key)
        one = self._passes[key]
        if self._rope is None or self._rope[0] != frames:
            hw = self._geometry[1:3]
            self._rope = frames, rope_table(self._model.head_dim, frames, hw[0] // 2, hw[1] // 2)
        cos, sin = self._rope[1]
        one.put("rope_cos", frames, lambda: cos)
        one.put("rope_sin", frames, lambda: sin)
        return one

    def _bind(self, part: str, count: int, past_frames: int) -> _Pass:
        batch, rows, columns, capacity_frames = self._geometry or (0, 0, 0, 0)
        if past_frames + count > capacity_frames:
            raise BackendError(
                f"a pass over {count} frames behind {past_frames} does not fit into "
                f"{capacity_frames} slots"
            )
        model = self._model
        past, own = past_frames * self._frame_tokens, count * self._frame_tokens
        inputs: dict[str, tuple[int, ...]] = {
            "latents": (batch, count, model.in_dim, rows, columns),
            "modulation": (6 * model.num_layers + 2, count, 1, model.dim),
            "rope_cos": (own, model.head_dim // 2),
            "rope_sin": (own, model.head_dim // 2),
        }
        if part == "joined":
            inputs["mask"] = (own, past + own)
        flow = (batch, count, model.out_dim, rows, columns)
        sizes = {"B": batch, "F": count, "T": own, "P": past, "S": past + own}
        sizes |= {"h": rows, "w": columns}
        one = _Pass(self._part_session(part, sizes), inputs, flow)
        for name, buffer in self._prompt.items():
            one.bind_input(name, buffer)
        for name, buffer in self._cache.items():
            one.bind_input(f"past_{name}", buffer[:past])
            one.bind_output(f"new_{name}", buffer[past : past + own])
        return one

    def _modulation(self, timestep: float, count: int) -> FloatArray:
        """What the network derives from a timestep; computed once, and kept."""
        key = (timestep, count)
        if key not in self._modulations:
            feed = {"timesteps": np.full((1, count), timestep, np.float32)}
            with run_errors(f"{self._path}: time"):
                (result,) = self._part_session("time").run(["modulation"], feed)
            self._modulations[key] = np.asarray(result)
        return self._modulations[key]

    def move(self, moves: Sequence[Move]) -> None:
        size = self._frame_tokens
        for move in moves:
            source = slice(move.source * size, (move.source + move.frames) * size)
            target = slice(move.target * size, (move.target + move.frames) * size)
            for buffer in self._cache.values():
                buffer[target] = buffer[source]

    def read_cache(self, layer: int, slots: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        tokens = np.concatenate(
            [
                np.arange(slot * self._frame_tokens, (slot + 1) * self._frame_tokens)
                for slot in slots
            ]
        )
        keys, values = (
            np.ascontiguousarray(self._cache[f"{kind}.{layer}"][tokens].swapaxes(0, 1), np.float32)
            for kind in "kv"
        )
        return keys, values

    def _release_buffers(self) -> None:
        """Drop the old buffers first, so that a larger cache need not fit beside a smaller one."""
        self._geometry = self._rope = None
        self._has_prompt = False
        self._passes, self._cache, self._prompt = {}, {}, {}

    def release(self) -> None:
        """Free all memory; the denoiser is of no use afterwards."""
        self._release_buffers()
        self._modulations.clear()
