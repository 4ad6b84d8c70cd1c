"""TensorRT backend: plans of `tensorrt` or `tensorrt_rtx` on an NVIDIA card, by way of cuda-python.

What can be checked without the card is checked first: a Runtime may crash the process where there is no
driver, so none is made before `present_gpu` has answered.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from asd_rt.backends.cuda import Cuda, import_cuda, present_gpu
from asd_rt.backends.device import DeviceEngine
from asd_rt.backends.tensorrt_part import REBUILD, TrtPart
from asd_rt.errors import BackendError, EngineError
from asd_rt.manifest import Manifest, manifest_path

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


class TrtEngine(DeviceEngine):
    """All parts of a TensorRT engine."""

    def __init__(
        self, path: Path, manifest: Manifest, trt: ModuleType, cuda: Cuda, gpu: str
    ) -> None:
        self._trt, self._runtime = trt, trt.Runtime(_logger(trt))
        super().__init__(path, manifest, cuda, f"{trt.__name__} {trt.__version__}, {gpu}")

    def _load(self, name: str, file: Path, stream: Any) -> TrtPart:
        return TrtPart(file, self._trt, self._runtime, self.cuda, stream)


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
