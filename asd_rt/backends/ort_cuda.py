"""ONNX Runtime on an NVIDIA card: the parts of an ONNX engine in the loop that plans run in.

Cache, prompt and codec state stay in device memory that is bound by address, as in the TensorRT backend,
whose denoiser and codec streams are used here. ONNX Runtime runs on the same CUDA stream as the copies, so
nothing waits for the host inside a pass. What it would compute on the CPU instead is an error: it lists its
CUDA provider even where there is no card, and falls back without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import FloatArray
from asd_rt.backends.cuda import Binding, Cuda, DeviceArray, import_cuda, present_gpu
from asd_rt.backends.ort import import_onnxruntime
from asd_rt.backends.ort_denoiser import run_errors
from asd_rt.backends.tensorrt import TrtDenoiser
from asd_rt.backends.tensorrt_codec import TrtCodecStream
from asd_rt.decoding import resolve_shape
from asd_rt.errors import BackendError, EngineError
from asd_rt.manifest import REBUILD, Manifest, Part, part_path

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
    """One graph whose inputs and outputs are device memory."""

    def __init__(self, file: Path, part: Part, ort: Any, session: Any, device: str) -> None:
        """`session` of `file`, which `part` describes; `device` as ONNX Runtime names its memory."""
        self._file, self._part, self._device = file, part, device
        self._session = session
        self._binding = session.io_binding()
        self._options = ort.RunOptions()
        # The stream is ours; what comes after the pass is queued on it too.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._sizes: dict[str, int] = {}

    def set_inputs(self, inputs: Mapping[str, Binding]) -> None:
        for name, (address, shape) in inputs.items():
            spec = self._part.inputs[name]
            self._sizes |= {
                n: size for n, size in zip(spec.shape, shape, strict=True) if isinstance(n, str)
            }
            self._binding.bind_input(name, self._device, 0, np.dtype(spec.dtype), shape, address)

    def shape_of(self, output: str) -> tuple[int, ...]:
        """Shape of an output, once all inputs are set."""
        return resolve_shape(self._part.outputs[output], self._sizes)

    def run(self, outputs: Mapping[str, int]) -> None:
        """Queue one pass that writes `outputs` (addresses by name)."""
        for name, address in outputs.items():
            dtype, shape = np.dtype(self._part.outputs[name].dtype), self.shape_of(name)
            self._binding.bind_output(name, self._device, 0, dtype, shape, address)
        with run_errors(f"{self._file}"):
            self._session.run_with_iobinding(self._binding, self._options)


class OrtCudaEngine:
    """All parts of an ONNX engine on a card; see `asd_rt.backends.base.Engine`."""

    provider, memory = CUDA_PROVIDER, "cuda"
    config: Mapping[str, str] = {"session.disable_cpu_ep_fallback": "1"}

    def __init__(self, path: Path, manifest: Manifest, ort: Any, cuda: Cuda, gpu: str) -> None:
        self.path, self.manifest, self.cuda = path, manifest, cuda
        self.device = f"{self.provider}, {gpu}"
        self._ort = ort
        self._parts: dict[str, OrtCudaPart] = {}
        self._streams: dict[tuple[str, tuple[int, int]], TrtCodecStream] = {}
        self._closed = False
        self.denoiser = TrtDenoiser(self)
        self.part("denoiser")  # what is wrong with the provider shows now

    def part(self, name: str) -> OrtCudaPart:
        """The part `name`, loaded once."""
        if self._closed:
            raise BackendError(f"{self.path}: the engine is closed; open it again with asd_rt.open")
        if name not in self._parts:
            file = part_path(self.path, self.manifest, name)
            session = self._load(file)
            self._parts[name] = OrtCudaPart(
                file, self.manifest.parts[name], self._ort, session, self.memory
            )
        return self._parts[name]

    def _load(self, file: Path) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, and said once
        for entry in self.config.items():
            options.add_session_config_entry(*entry)
        try:
            session = self._ort.InferenceSession(
                str(file), options, providers=[(self.provider, self._provider_options())]
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
                f"are missing: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        session.disable_fallback()
        return session

    def _provider_options(self) -> dict[str, str]:
        return {"device_id": "0", "user_compute_stream": str(int(self.cuda.stream))}

    def encode_prompt(self, tokens: NDArray[np.int64]) -> FloatArray:
        part, given, made = self.part("text"), DeviceArray(self.cuda), DeviceArray(self.cuda)
        part.set_inputs({"tokens": given.put(tokens)})
        result = np.empty(part.shape_of("context"), np.float32)
        address = made.room(result.nbytes)
        part.run({"context": address})
        self.cuda.download(result, address)
        made.release()
        given.release()
        return result

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
