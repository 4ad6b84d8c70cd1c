"""ONNX Runtime backend: the sessions of an engine's parts. The denoiser's buffers: ort_denoiser.py."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import FloatArray
from asd_rt.backends.ort_denoiser import OrtDenoiser, run_errors
from asd_rt.errors import BackendError, EngineError
from asd_rt.machine import usable_cores
from asd_rt.manifest import REBUILD, Manifest, TensorSpec, part_path

CPU_PROVIDER = "CPUExecutionProvider"
INSTALL = "pip install 'asd-rt[cpu]'"
_log = logging.getLogger(__name__)


def open_engine(
    path: Path, manifest: Manifest, threads: int | None = None, provider: str = CPU_PROVIDER
) -> OrtEngine:
    """Open an ONNX engine whose files have been verified.

    Args:
        path: the denoiser's file.
        manifest: of the engine.
        threads: for one operator; None = usable cores.
        provider: execution provider; it is this one or an error, never a silent fallback.

    Raises:
        BackendError: onnxruntime or the provider is absent.
        EngineError: ONNX Runtime cannot load a part, or a part is not what the manifest says.
    """
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise BackendError(f"threads must be a whole number >= 1, found {threads!r}")
    ort = _import_onnxruntime()
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"this onnxruntime {ort.__version__} has no {provider}, only "
            f"{', '.join(ort.get_available_providers())}; for the CPU: {INSTALL}"
        )
    return OrtEngine(path, manifest, threads or usable_cores(), provider)


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime cannot be imported ({error}); install it: {INSTALL}"
        ) from error
    return onnxruntime


def _check_tensors(
    where: str, side: str, found: Mapping[str, str], expected: Mapping[str, TensorSpec]
) -> None:
    """The tensors of a session are those of the manifest: names and dtypes."""
    wanted = {name: spec.dtype for name, spec in expected.items()}
    if dict(found) != wanted:
        differing = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
        name = differing[0]
        raise EngineError(
            f"{where}: {side} {name} differs from the manifest: expected {wanted.get(name, 'none')}, "
            f"found {found.get(name, 'none')} ({len(differing)} differ); build it again with: {REBUILD}"
        )


_ELEMENT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
}


class OrtEngine:
    """All parts of an ONNX engine; the encoder, which few need, is loaded when first used."""

    def __init__(self, path: Path, manifest: Manifest, threads: int, provider: str) -> None:
        self.path = path
        self.manifest = manifest
        self.threads = threads
        self.provider = provider
        self._sessions: dict[str, Any] = {}
        self._closed = False
        for part in manifest.parts:
            if part != "encoder":
                self.session(part)
        self.denoiser = OrtDenoiser(path, manifest, self.session)

    @property
    def device(self) -> str:
        return f"{self.provider}, {self.threads} {'thread' if self.threads == 1 else 'threads'}"

    def session(self, part: str) -> Any:
        """The onnxruntime session of `part`, created once.

        Raises:
            EngineError: no such part, or it cannot be loaded or is not what the manifest says.
            BackendError: the provider refuses it, or the engine is closed.
        """
        if part not in self._sessions:
            self._sessions[part] = self._load(part)
        return self._sessions[part]

    def _load(self, part: str) -> Any:
        if self._closed:
            raise BackendError(f"{self.path}: the engine is closed; open it again with asd_rt.open")
        ort = _import_onnxruntime()
        file = part_path(self.path, self.manifest, part)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if part != "denoiser":
            # A pool that waits actively for its next call would take the cores from the denoiser's.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(str(file), options, providers=[self.provider])
        except (
            Exception
        ) as error:  # its exceptions share no base class; none may reach the user raw
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EngineError(
                f"{file}: ONNX Runtime {ort.__version__} cannot load the {part} part ({first_line}); "
                f"build it again with: {REBUILD}"
            ) from error
        active = session.get_providers()
        if active[:1] != [self.provider]:
            raise BackendError(
                f"{file}: asked for {self.provider}, got {', '.join(active)}; the provider's libraries are "
                f"missing or there is no such device"
            )
        session.disable_fallback()
        spec = self.manifest.parts[part]
        for side, values, expected in (
            ("input", session.get_inputs(), spec.inputs),
            ("output", session.get_outputs(), spec.outputs),
        ):
            found = {v.name: _ELEMENT_TYPES.get(v.type, v.type) for v in values}
            _check_tensors(str(file), side, found, expected)
        _log.info("loaded %s (%s)", file, self.device)
        return session

    def run_part(self, part: str, output: str, **inputs: NDArray[Any]) -> NDArray[Any]:
        """Run a part with one output of interest."""
        session = self.session(part)
        with run_errors(f"{self.path}: {part}"):
            (result,) = session.run([output], inputs)
        return np.asarray(result)

    def encode_prompt(self, tokens: NDArray[np.int64]) -> FloatArray:
        return self.run_part("text", "context", tokens=tokens)

    def decode(self, latents: FloatArray) -> FloatArray:
        return self.run_part("decoder", "frames", latents=latents)

    def encode(self, frames: FloatArray) -> FloatArray:
        return self.run_part("encoder", "latents", frames=frames)

    def close(self) -> None:
        self._closed = True
        self.denoiser.release()
        self._sessions.clear()
