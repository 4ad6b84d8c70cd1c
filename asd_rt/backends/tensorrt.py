"""TensorRT backend: plans of `tensorrt` or `tensorrt_rtx` on an NVIDIA card, by way of cuda-python.

What can be checked without the card is checked first: a Runtime may crash the process where there is no
driver, so none is made before `present_gpu` has answered. Passes and what serves them share one stream; the
codec has its own, so that neither waits for the other.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import FloatArray
from asd_rt.backends.cuda import Cuda, DeviceArray, import_cuda, present_gpu
from asd_rt.backends.tensorrt_codec import TrtCodecStream
from asd_rt.backends.tensorrt_denoiser import TrtDenoiser
from asd_rt.backends.tensorrt_part import REBUILD, TrtPart
from asd_rt.errors import BackendError, EngineError
from asd_rt.manifest import Manifest, manifest_path, part_path
from asd_rt.manifest_schema import CODEC_GRAPHS

INSTALL = {
    "tensorrt_rtx": "pip install 'asd-rt[rtx]'",
    "tensorrt": "install TensorRT 11 from NVIDIA's package index",
}
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


class TrtEngine:
    """All parts of a TensorRT engine; see `asd_rt.backends.base.Engine`."""

    def __init__(
        self, path: Path, manifest: Manifest, trt: ModuleType, cuda: Cuda, gpu: str
    ) -> None:
        self.path, self.manifest, self.cuda, self._trt = path, manifest, cuda, trt
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
            codec = name in CODEC_GRAPHS
            self._parts[name] = TrtPart(
                part_path(self.path, self.manifest, name),
                self._trt,
                self._runtime,
                self.cuda,
                self.cuda.codec_stream if codec else self.cuda.stream,
            )
        return self._parts[name]

    def new_denoiser(self) -> TrtDenoiser:
        """Another denoiser over the same plans, with a KV cache of its own; the caller releases it."""
        return TrtDenoiser(self)

    def _run_host(self, name: str, source: str, target: str, array: NDArray[Any]) -> FloatArray:
        """Run a part with one input and one output that live on the host."""
        context, given, made = self.part(name).usual, DeviceArray(self.cuda), DeviceArray(self.cuda)
        try:
            context.set_inputs({source: given.put(array)})
            result = np.empty(context.shape_of(target), np.float32)
            address = made.room(result.nbytes)
            context.set_outputs({target: address})
            context.run()
            self.cuda.download(result, address)
        finally:
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
        """Release everything, after a failed pass too."""
        if self._closed:
            return
        self._closed = True
        try:
            self.cuda.close()  # graphs before the contexts that they were captured from
        finally:
            self._streams.clear()
            self._parts.clear()


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
