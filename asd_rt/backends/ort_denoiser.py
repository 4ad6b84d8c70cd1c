"""The denoiser in ONNX Runtime: static buffers, and a cache prefix that is bound, never copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import FloatArray
from asd_rt.backends.openvino import from_bf16, to_bf16
from asd_rt.errors import BackendError, EngineError
from asd_rt.kv_cache import Move, joined_mask
from asd_rt.manifest import REBUILD, Manifest, manifest_path
from asd_rt.rope import rope_table

MAX_SIZES = 16  # of passes whose bindings are kept
ROPE_AHEAD_FRAMES, ROPE_AHEAD_TOKENS = 24, 4096  # of positions computed at once
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
        RuntimeError,
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
        holds: what was last copied into an input, so that it is not copied again.
    """

    def __init__(
        self, session: Any, inputs: Mapping[str, tuple[int, ...]], flow: FloatArray
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self.inputs: dict[str, NDArray[Any]] = {
            name: np.zeros(shape, np.bool_ if name == "mask" else np.float32)
            for name, shape in inputs.items()
        }
        self.holds: dict[str, object] = {}
        for name, array in self.inputs.items():
            self.bind_input(name, array)
        self.bind_output("flow", flow)

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

    A pass serves one video: those of a batch take turns. Buffers are numpy arrays that live as long as the
    geometry does; sessions read and write them through IO bindings by address. A full window never changes
    shape, so from then on one binding serves all passes.
    """

    _geometry: (
        tuple[int, int, int, int] | None
    )  # batch, latent rows, latent columns, capacity frames
    _rope: tuple[range, tuple[FloatArray, FloatArray]] | None
    _context: FloatArray | None  # whose keys and values are in `_prompt`
    _passes: dict[tuple[str, int, int], list[_Pass]]  # by part, frames and past frames; one a video
    _flows: dict[int, FloatArray]  # results, by frames of a pass
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
        # OpenVINO keeps keys and values in bfloat16.
        self._bf16 = manifest.runtime == "openvino"
        self._kv_dtype: Any = np.uint16 if self._bf16 else _KV_DTYPES[dtype]
        self._layers = range(manifest.model.num_layers)
        self._modulations: dict[float, FloatArray] = {}
        self._release_buffers()

    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        rows, columns = latent_hw
        self._has_prompt = False
        if self._geometry == (batch, rows, columns, capacity_frames):
            return
        self._check_fixed("latents", {3: rows, 4: columns})
        model = self._model
        self._frame_tokens = (rows // 2) * (columns // 2)
        shape = (batch, capacity_frames * self._frame_tokens, model.dim)
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
            f"prompt_{name}": np.zeros((batch, model.text_len, model.dim), self._kv_dtype)
            for name in names
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
        if self._context is not None and np.array_equal(context, self._context):
            self._has_prompt = True  # the last video's, still in place
            return
        self._context = None
        session = self._part_session("prompt")
        for item, one in enumerate(np.ascontiguousarray(context, np.float32)):
            with run_errors(f"{self._path}: prompt"):
                results = session.run(list(self._prompt), {"context": one[None]})
            for buffer, result in zip(self._prompt.values(), results, strict=True):
                buffer[item] = to_bf16(result[0]) if self._bf16 else result[0]
        self._context = context.copy()
        self._has_prompt = True

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        for item, one in enumerate(self._passes_of("denoiser", frames, past_frames)):
            one.put("modulation", timestep, lambda: self._modulation(timestep))
            np.copyto(one.inputs["latents"], latents[item : item + 1])
            self._run("denoiser", one)
        return self._flows[len(frames)]

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
        size = len(frames) // 2

        def modulation() -> FloatArray:
            blocks = [self._modulation(t)[:, None, None].repeat(size, 1) for t in (0.0, timestep)]
            return np.concatenate(blocks, axis=1)

        def mask() -> NDArray[np.bool_]:
            return joined_mask(size, past_frames, hidden, self._frame_tokens)

        for item, one in enumerate(self._passes_of("joined", frames, past_frames)):
            one.put("modulation", timestep, modulation)
            one.put("mask", tuple(hidden), mask)
            np.copyto(one.inputs["latents"][0, :size], clean[item])
            np.copyto(one.inputs["latents"][0, size:], noisy[item])
            self._run("joined", one)
        return self._flows[len(frames)][:, size:]

    def _run(self, part: str, one: _Pass) -> None:
        with run_errors(f"{self._path}: {part}"):
            one.run()

    def _passes_of(self, part: str, frames: range, past_frames: int) -> list[_Pass]:
        """The passes of this size, one for each video of the batch, with positions in place."""
        if self._geometry is None or not self._has_prompt:
            raise BackendError("denoise needs prepare and set_prompt first")
        key = (part, len(frames), past_frames)
        if key not in self._passes:
            if len(self._passes) >= MAX_SIZES:  # a video without a window meets each size once
                del self._passes[next(iter(self._passes))]
            batch = self._geometry[0]
            self._passes[key] = [self._bind(*key, item) for item in range(batch)]
        for one in self._passes[key]:
            one.put("rope_cos", frames, lambda: self._rope_of(frames)[0])
            one.put("rope_sin", frames, lambda: self._rope_of(frames)[1])
        return self._passes[key]

    def _rope_of(self, frames: range) -> tuple[FloatArray, FloatArray]:
        """Cosines and sines of these frames; small ones are computed ahead, for several blocks at once."""
        size = self._frame_tokens
        held = self._rope[0] if self._rope else range(0)
        if self._rope is None or frames.start < held.start or frames.stop > held.stop:
            _, rows, columns, _ = self._geometry or (0, 0, 0, 0)
            count = max(len(frames), min(ROPE_AHEAD_FRAMES, ROPE_AHEAD_TOKENS // size))
            held = range(frames.start, frames.start + count)
            table = rope_table(self._model.head_dim, held, rows // 2, columns // 2)
            self._rope = held, table
        cos, sin = self._rope[1]
        rows_of = slice((frames.start - held.start) * size, (frames.stop - held.start) * size)
        return cos[rows_of], sin[rows_of]

    def _bind(self, part: str, count: int, past_frames: int, item: int) -> _Pass:
        batch, rows, columns, capacity_frames = self._geometry or (0, 0, 0, 0)
        if past_frames + count > capacity_frames:
            raise BackendError(
                f"a pass over {count} frames behind {past_frames} does not fit into "
                f"{capacity_frames} slots"
            )
        model = self._model
        past, own = past_frames * self._frame_tokens, count * self._frame_tokens
        count_rows = 6 * model.num_layers + 2
        inputs: dict[str, tuple[int, ...]] = {
            "latents": (1, count, model.in_dim, rows, columns),
            "modulation": (count_rows, model.dim),
            "rope_cos": (own, model.head_dim // 2),
            "rope_sin": (own, model.head_dim // 2),
        }
        if part == "joined":
            inputs["modulation"] = (count_rows, count, 1, model.dim)
            inputs["mask"] = (own, past + own)
        if count not in self._flows:
            shape = (batch, count, model.out_dim, rows, columns)
            self._flows[count] = np.zeros(shape, np.float32)
        sizes = {"F": count, "T": own, "h": rows, "w": columns}
        if past:  # OpenVINO takes no tensor whose size is fixed to nothing
            sizes |= {"P": past, "S": past + own}
        one = _Pass(self._part_session(part, sizes), inputs, self._flows[count][item : item + 1])
        for name, buffer in self._prompt.items():
            one.bind_input(name, buffer[item : item + 1])
        for name, buffer in self._cache.items():
            one.bind_input(f"past_{name}", buffer[item : item + 1, :past])
            one.bind_output(f"new_{name}", buffer[item : item + 1, past : past + own])
        return one

    def _modulation(self, timestep: float) -> FloatArray:
        """What the network derives from a timestep; computed once, and kept."""
        if timestep not in self._modulations:
            feed = {"timestep": np.array([timestep], np.float32)}
            with run_errors(f"{self._path}: time"):
                (result,) = self._part_session("time").run(["modulation"], feed)
            self._modulations[timestep] = np.asarray(result)
        return self._modulations[timestep]

    def move(self, moves: Sequence[Move]) -> None:
        size = self._frame_tokens
        for move in moves:
            source = slice(move.source * size, (move.source + move.frames) * size)
            target = slice(move.target * size, (move.target + move.frames) * size)
            for buffer in self._cache.values():
                buffer[:, target] = buffer[:, source]

    def read_cache(self, layer: int, slots: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        tokens = np.concatenate(
            [
                np.arange(slot * self._frame_tokens, (slot + 1) * self._frame_tokens)
                for slot in slots
            ]
        )
        heads = (self._model.num_heads, self._model.head_dim)
        keys, values = (
            from_bf16(held) if self._bf16 else held.astype(np.float32)
            for held in (self._cache[f"{kind}.{layer}"][:, tokens] for kind in "kv")
        )
        return keys.reshape(*keys.shape[:2], *heads), values.reshape(*keys.shape[:2], *heads)

    def _release_buffers(self) -> None:
        """Drop the old buffers first, so that a larger cache need not fit beside a smaller one."""
        self._geometry = self._rope = self._context = None
        self._has_prompt = False
        self._passes, self._flows, self._cache, self._prompt = {}, {}, {}, {}

    def release(self) -> None:
        """Free all memory; the denoiser is of no use afterwards."""
        self._release_buffers()
        self._modulations.clear()
