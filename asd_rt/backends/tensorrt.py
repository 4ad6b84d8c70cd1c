"""TensorRT backend: plans of `tensorrt` or `tensorrt_rtx` on an NVIDIA card, by way of cuda-python.

What can be checked without the card is checked first: a Runtime may crash the process where there is no
driver, so none is made before `present_gpu` has answered. The KV cache stays on the device; a pass binds its
prefix by address and shape, and the engine writes new keys and values right behind it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import FloatArray
from asd_rt.backends.cuda import Binding, Cuda, DeviceArray, import_cuda, present_gpu
from asd_rt.backends.tensorrt_codec import TrtCodecStream
from asd_rt.errors import BackendError, EngineError
from asd_rt.kv_cache import Move
from asd_rt.manifest import Manifest, manifest_path, part_path
from asd_rt.rope import rope_table

INSTALL = {
    "tensorrt_rtx": "pip install 'asd-rt[rtx]'",
    "tensorrt": "install TensorRT 11 from NVIDIA's package index",
}
REBUILD = "python -m export.build --steps 1 --target tensorrt --force"
_log = logging.getLogger(__name__)


def open_engine(path: Path, manifest: Manifest) -> TrtEngine:
    """Open a TensorRT engine whose files have been verified.

    Args:
        path: the denoiser's plan.
        manifest: of the engine.

    Raises:
        EngineError: the plan is of another TensorRT, another version of it, or another GPU.
        BackendError: TensorRT, cuda-python, the driver or a card is absent.
    """
    trt = _import_tensorrt(path, manifest)
    runtime = import_cuda()
    gpu = present_gpu()
    if manifest.gpus and gpu not in manifest.gpus:
        raise EngineError(
            f"{manifest_path(path)}: the plan is for {', '.join(manifest.gpus)}, this machine has {gpu}; "
            f"build it for this one: {REBUILD} --gpu {gpu}"
        )
    return TrtEngine(path, manifest, trt, Cuda(runtime), gpu)


def _import_tensorrt(path: Path, manifest: Manifest) -> ModuleType:
    name = manifest.backend
    if name not in INSTALL:
        raise EngineError(
            f"{manifest_path(path)}: backend {name} is not one of {', '.join(INSTALL)}"
        )
    try:
        trt = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BackendError(
            f"{path}: needs {name}, which cannot be imported ({error}); {INSTALL[name]}"
        ) from error
    built = manifest.tools.get(name)
    if built != trt.__version__:
        raise EngineError(
            f"{manifest_path(path)}: the plan was built by {name} {built}, installed is {trt.__version__}; "
            f"a plan serves one version only: build it again with {REBUILD}, or pip install "
            f"{name.replace('_', '-')}=={built}"
        )
    return trt


class TrtPart:
    """One plan with its execution context."""

    def __init__(self, file: Path, runtime: Any, cuda: Cuda) -> None:
        self._file, self._cuda = file, cuda
        self._engine = runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{file}: TensorRT cannot read this plan here; build it again: {REBUILD}"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"{file}: no execution context; the card has too little free memory")

    def set_inputs(self, inputs: Mapping[str, Binding]) -> None:
        for name, (address, shape) in inputs.items():
            if not self._context.set_input_shape(name, shape):
                raise BackendError(
                    f"{self._file}: {name} {list(shape)} is outside the sizes this plan was built for; "
                    f"build it with other --window-frames, --max-frames or --latent-size: {REBUILD}"
                )
            self._set(name, address)

    def shape_of(self, output: str) -> tuple[int, ...]:
        """Shape of an output, once all inputs are set."""
        return tuple(self._context.get_tensor_shape(output))

    def run(self, outputs: Mapping[str, int]) -> None:
        """Queue one pass that writes `outputs` (addresses by name)."""
        for name, address in outputs.items():
            self._set(name, address)
        if not self._context.execute_async_v3(int(self._cuda.stream)):
            raise BackendError(f"{self._file}: TensorRT could not run this part")

    def _set(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"{self._file}: has no tensor {name}; build it again: {REBUILD}")


class TrtEngine:
    """All parts of a TensorRT engine; see `asd_rt.backends.base.Engine`."""

    def __init__(
        self, path: Path, manifest: Manifest, trt: ModuleType, cuda: Cuda, gpu: str
    ) -> None:
        self.path, self.manifest, self.cuda = path, manifest, cuda
        self.device = f"{trt.__name__} {trt.__version__}, {gpu}"
        self._runtime = trt.Runtime(_logger(trt))
        self._parts: dict[str, TrtPart] = {}
        self._streams: dict[tuple[str, tuple[int, int]], TrtCodecStream] = {}
        self._closed = False
        self.denoiser = TrtDenoiser(self)

    def part(self, name: str) -> TrtPart:
        """The part `name`, loaded once."""
        if self._closed:
            raise BackendError(f"{self.path}: the engine is closed; open it again with asd_rt.open")
        if name not in self._parts:
            self._parts[name] = TrtPart(
                part_path(self.path, self.manifest, name), self._runtime, self.cuda
            )
        return self._parts[name]

    def new_denoiser(self) -> TrtDenoiser:
        return TrtDenoiser(self)

    def _run_host(self, name: str, source: str, target: str, array: NDArray[Any]) -> FloatArray:
        """Run a part with one input and one output that live on the host."""
        part, given, made = self.part(name), DeviceArray(self.cuda), DeviceArray(self.cuda)
        part.set_inputs({source: given.put(array)})
        result = np.empty(part.shape_of(target), np.float32)
        address = made.room(result.nbytes)
        part.run({target: address})
        self.cuda.download(result, address)
        made.release()
        given.release()
        return result

    def encode_prompt(self, tokens: NDArray[np.int64]) -> FloatArray:
        return self._run_host("text", "tokens", "context", tokens)

    def codec_stream(self, part: str, latent_hw: tuple[int, int]) -> TrtCodecStream:
        part_path(self.path, self.manifest, part)  # raises where there is none
        key = (part, latent_hw)
        if key not in self._streams:
            self._streams[key] = TrtCodecStream(self, part, latent_hw)
        return self._streams[key]

    def close(self) -> None:
        self._closed = True
        self._parts.clear()
        self._streams.clear()
        self.cuda.close()


class TrtDenoiser:
    """See `asd_rt.backends.base.Denoiser`."""

    def __init__(self, engine: TrtEngine) -> None:
        self._engine, self._cuda = engine, engine.cuda
        model = engine.manifest.model
        self._model, self._layers = model, range(model.num_layers)
        self._names = [f"{kind}.{i}" for i in self._layers for kind in "kv"]
        dtype = engine.manifest.parts["denoiser"].outputs["new_k.0"].dtype
        self._kv_dtype = np.dtype(dtype)
        self._buffers: dict[str, DeviceArray] = {}
        self._cache: dict[str, int] = {}
        self._prompt: dict[str, Binding] = {}
        self._modulations: dict[float, dict[str, Binding]] = {}
        self._rope: tuple[range, dict[str, Binding]] | None = None
        self._geometry: tuple[int, int, int, int] | None = None

    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        fixed = self._engine.manifest.latent_hw
        if fixed is not None and tuple(latent_hw) != fixed:
            raise BackendError(
                f"{self._engine.path}: is fixed to latents of {fixed}, found {tuple(latent_hw)}"
            )
        if batch != 1:
            raise BackendError(
                f"{self._engine.path}: a plan serves one video at a time, found a batch of {batch}"
            )
        self._prompt, self._rope = {}, None
        geometry = (batch, *latent_hw, capacity_frames)
        if geometry == self._geometry:
            return
        self._cuda.synchronize()
        for address in self._cache.values():
            self._cuda.free(address)
        self._cache, self._geometry = {}, None
        self._frame_tokens = (latent_hw[0] // 2) * (latent_hw[1] // 2)
        self._token_bytes = self._model.dim * self._kv_dtype.itemsize
        size = capacity_frames * self._frame_tokens * self._token_bytes
        for name in self._names:
            self._cache[name] = self._cuda.allocate(size)
        self._geometry = geometry

    def _buffer(self, name: str) -> DeviceArray:
        return self._buffers.setdefault(name, DeviceArray(self._cuda))

    def release(self) -> None:
        self._cuda.synchronize()
        for address in self._cache.values():
            self._cuda.free(address)
        for buffer in self._buffers.values():
            buffer.release()
        self._cache, self._buffers, self._geometry, self._prompt = {}, {}, None, {}

    def set_prompt(self, context: FloatArray) -> None:
        part = self._engine.part("prompt")
        part.set_inputs(
            {"context": self._buffer("context").put(context.astype(np.float32, copy=False))}
        )
        shape = (1, self._model.text_len, self._model.dim)
        size = self._model.text_len * self._token_bytes
        self._prompt = {
            f"prompt_{n}": (self._buffer(f"prompt_{n}").room(size), shape) for n in self._names
        }
        part.run({name: address for name, (address, _) in self._prompt.items()})

    def _modulation(self, timestep: float) -> dict[str, Binding]:
        if timestep not in self._modulations:
            part, name = self._engine.part("time"), "modulation"
            given = np.full(1, timestep, np.float32)
            part.set_inputs({"timestep": self._buffer("timestep").put(given)})
            shape = (6 * self._model.num_layers + 2, self._model.dim)
            address = self._cuda.allocate(4 * int(np.prod(shape)))
            part.run({name: address})
            self._modulations[timestep] = {name: (address, shape)}
        return self._modulations[timestep]

    def _positions(self, frames: range, latent_hw: tuple[int, int]) -> dict[str, Binding]:
        if self._rope is None or self._rope[0] != frames:
            tables = rope_table(self._model.head_dim, frames, latent_hw[0] // 2, latent_hw[1] // 2)
            names = ("rope_cos", "rope_sin")
            self._cuda.synchronize()  # the last pass may still read the old ones
            self._rope = (
                frames,
                {n: self._buffer(n).put(t) for n, t in zip(names, tables, strict=True)},
            )
        return self._rope[1]

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        if self._geometry is None or not self._prompt:
            raise BackendError("denoise needs prepare and set_prompt first")
        batch, rows, columns, capacity = self._geometry
        if past_frames + len(frames) > capacity:
            raise BackendError(
                f"{len(frames)} frames behind {past_frames} do not fit into {capacity} slots"
            )
        past = past_frames * self._frame_tokens
        behind = past * self._token_bytes
        part = self._engine.part("denoiser")
        part.set_inputs(
            {"latents": self._buffer("latents").put(latents.astype(np.float32, copy=False))}
            | self._modulation(timestep)
            | self._positions(frames, (rows, columns))
            | self._prompt
            | {
                f"past_{name}": (self._cache[name], (1, past, self._model.dim))
                for name in self._names
            }
        )
        flow = np.empty((batch, len(frames), self._model.out_dim, rows, columns), np.float32)
        address = self._buffer("flow").room(flow.nbytes)
        part.run(
            {"flow": address} | {f"new_{name}": self._cache[name] + behind for name in self._names}
        )
        self._cuda.download(flow, address)
        return flow

    can_join = False

    def denoise_joined(
        self,
        clean: FloatArray,
        noisy: FloatArray,
        timestep: float,
        frames: range,
        past_frames: int,
        hidden: Sequence[int],
    ) -> FloatArray:
        raise BackendError(f"{self._engine.path}: plans have no joined pass")

    def move(self, moves: Sequence[Move]) -> None:
        size = self._frame_tokens * self._token_bytes
        for move in moves:
            for base in self._cache.values():
                self._cuda.copy(
                    base + move.target * size, base + move.source * size, move.frames * size
                )

    def read_cache(self, layer: int, slots: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        shape = (self._frame_tokens, self._model.num_heads, self._model.head_dim)
        size = self._frame_tokens * self._token_bytes

        def read(base: int) -> FloatArray:
            frames = [np.empty(shape, self._kv_dtype) for _ in slots]
            for frame, slot in zip(frames, slots, strict=True):
                self._cuda.download(frame, base + slot * size)
            return np.concatenate(frames)[None].astype(np.float32)

        return read(self._cache[f"k.{layer}"]), read(self._cache[f"v.{layer}"])


@cache
def _logger(trt: ModuleType) -> Any:
    """TensorRT's one logger of this process, which passes on to `logging`."""
    levels = {0: logging.ERROR, 1: logging.ERROR, 2: logging.WARNING}

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            _log.log(levels.get(int(severity), logging.DEBUG), "%s", text)

    return Logger()
