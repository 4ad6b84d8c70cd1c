"""ONNX Runtime on an NVIDIA card: the parts of an ONNX engine in the loop that plans run in.

Cache, prompt and codec state stay in device memory that is bound by address. ONNX Runtime runs on the same
CUDA stream as the copies, so nothing waits for the host inside a pass. What it would compute on the CPU
instead is an error: it lists its CUDA provider even where there is no card, and falls back without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from asd_rt.backends.cuda import Binding, Cuda, import_cuda, present_gpu
from asd_rt.backends.device import DeviceEngine
from asd_rt.backends.ort import import_onnxruntime
from asd_rt.backends.ort_denoiser import run_errors
from asd_rt.decoding import resolve_shape
from asd_rt.errors import BackendError, EngineError
from asd_rt.manifest import REBUILD, Manifest, Part

CUDA_PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip install 'asd-rt[gpu]', in an environment without [cpu]: the two exclude each other"
_log = logging.getLogger(__name__)


def is_available() -> bool:
    """Whether ONNX Runtime is installed and built with CUDA; it may still lack a card."""
    try:
        return CUDA_PROVIDER in import_onnxruntime().get_available_providers()
    except BackendError:
        return False


def open_engine(path: Path, manifest: Manifest) -> OrtCudaEngine:
    """Open an ONNX engine, whose files have been verified, on this machine's first card.

    Raises:
        BackendError: this onnxruntime has no CUDA, or cuda-python, the driver or a card is absent, or the
            engine is one for OpenVINO.
        EngineError: ONNX Runtime cannot load a part, or not all of it runs on the card.
    """
    if manifest.runtime == "openvino":
        raise BackendError(
            f"{path}: a {manifest.precision} engine of this size runs on OpenVINO, on a CPU; build one for "
            f"the card: {REBUILD} --precision fp16"
        )
    ort = import_onnxruntime()
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise BackendError(
            f"this onnxruntime {ort.__version__} has no {CUDA_PROVIDER}, only "
            f"{', '.join(ort.get_available_providers())}; {INSTALL}"
        )
    runtime, gpu = import_cuda(), present_gpu()
    with redirect_stdout(StringIO()) as said:  # CUDA and cuDNN as Python packages, where they are
        ort.preload_dlls()
    _log.debug("%s", said.getvalue())
    return OrtCudaEngine(path, manifest, ort, Cuda(runtime), gpu)


class OrtCudaPart:
    """One graph, loaded."""

    def __init__(self, file: Path, part: Part, ort: Any, session: Any, memory: str) -> None:
        """`session` of `file`, which `part` describes; `memory` as ONNX Runtime names the card's."""
        self.file, self.part, self.session, self.memory = file, part, session, memory
        self.options = ort.RunOptions()
        # The stream is ours; what comes after the pass is queued on it too.
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.usual = self.new_context()

    def new_context(self) -> OrtCudaContext:
        """Tensors of one size of pass."""
        return OrtCudaContext(self)

    def release(self) -> None:
        """Let go of the session; see `asd_rt.backends.device.DevicePart`."""
        del self.usual, self.session


class OrtCudaContext:
    """See `asd_rt.backends.device.DeviceContext`."""

    def __init__(self, part: OrtCudaPart) -> None:
        self._of = part
        self._binding = part.session.io_binding()
        self._sizes: dict[str, int] = {}

    def set_inputs(self, inputs: Mapping[str, Binding]) -> None:
        for name, (address, shape) in inputs.items():
            spec = self._of.part.inputs[name]
            symbols = zip(spec.shape, shape, strict=True)
            self._sizes |= {n: size for n, size in symbols if isinstance(n, str)}
            dtype = np.dtype(spec.dtype)
            self._binding.bind_input(name, self._of.memory, 0, dtype, shape, address)

    def set_outputs(self, outputs: Mapping[str, int]) -> None:
        for name, address in outputs.items():
            dtype, shape = np.dtype(self._of.part.outputs[name].dtype), self.shape_of(name)
            self._binding.bind_output(name, self._of.memory, 0, dtype, shape, address)

    def shape_of(self, output: str) -> tuple[int, ...]:
        return resolve_shape(self._of.part.outputs[output], self._sizes)

    def run(self) -> None:
        with run_errors(f"{self._of.file}"):
            self._of.session.run_with_iobinding(self._binding, self._of.options)

    def replay(self) -> None:
        self.run()

    def release(self) -> None:
        """Nothing is held but addresses."""


class OrtCudaEngine(DeviceEngine):
    """All parts of an ONNX engine on a card."""

    provider, memory = CUDA_PROVIDER, "cuda"
    config: Mapping[str, str] = {"session.disable_cpu_ep_fallback": "1"}

    def __init__(self, path: Path, manifest: Manifest, ort: Any, cuda: Cuda, gpu: str) -> None:
        self._ort = ort
        super().__init__(path, manifest, cuda, f"{self.provider}, {gpu}")
        try:
            self.part("denoiser")  # what is wrong with the provider shows now
        except BaseException:
            self.close()
            raise

    def _load(self, name: str, file: Path, stream: Any) -> OrtCudaPart:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, and said once
        for entry in self.config.items():
            options.add_session_config_entry(*entry)
        try:
            session = self._ort.InferenceSession(
                str(file), options, providers=[(self.provider, self._provider_options(stream))]
            )
        except (
            Exception
        ) as error:  # its exceptions share no base class; none may reach the user raw
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(
                f"{file}: ONNX Runtime {self._ort.__version__} cannot run all of this graph on the card "
                f"({first_line}); build a plan: python -m export.build --steps 1 --target tensorrt"
            ) from error
        active = session.get_providers()
        if active[:1] != [self.provider]:
            raise BackendError(
                f"{file}: asked for {self.provider}, got {', '.join(active)}; CUDA's or cuDNN's libraries "
                f"are missing: {INSTALL}"
            )
        session.disable_fallback()
        return OrtCudaPart(file, self.manifest.parts[name], self._ort, session, self.memory)

    def _provider_options(self, stream: Any) -> dict[str, str]:
        return {"device_id": "0", "user_compute_stream": str(int(stream))}
