"""ONNX Runtime backend: the sessions of an engine's parts. The denoiser's buffers: ort_denoiser.py.

The passes of some engines run on OpenVINO instead: ONNX Runtime computes no bfloat16 on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.backends.base import FloatArray
from asd_rt.backends.openvino import NAME, OpenVinoSession, import_openvino
from asd_rt.backends.ort_codec import OrtCodecStream
from asd_rt.backends.ort_denoiser import OrtDenoiser, run_errors
from asd_rt.decoding import has_large_codec
from asd_rt.errors import BackendError, EngineError
from asd_rt.machine import instruction_sets, usable_cores
from asd_rt.manifest import REBUILD, Manifest, TensorSpec, late_parts, part_path
from asd_rt.manifest_schema import CODEC_GRAPHS
from asd_rt.planner import is_large

CPU_PROVIDER = "CPUExecutionProvider"
INSTALL = "pip install 'asd-rt[cpu]'"
SMALL_BYTES = 16 << 20  # of an engine's weights
SMALL_CODEC_BYTES = 1 << 20  # its convolutions do more with a weight
_LATE = ("joined", "step", "encoder_first", "encoder", "weights", "codec_weights")  # or never
_PASSES = ("denoiser", "joined")  # the parts that run all the time
_log = logging.getLogger(__name__)


def open_engine(
    path: Path, manifest: Manifest, threads: int | None = None, provider: str = CPU_PROVIDER
) -> OrtEngine:
    """Open an ONNX engine whose files have been verified.

    Args:
        path: the denoiser's file.
        manifest: of the engine.
        threads: for one operator; None = usable cores.
        provider: execution provider, of ONNX Runtime; it is this one or an error, never a silent fallback.

    Raises:
        BackendError: onnxruntime or the provider is absent.
        EngineError: ONNX Runtime cannot load a part, or a part is not what the manifest says.
    """
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise BackendError(f"threads must be a whole number >= 1, found {threads!r}")
    ort = import_onnxruntime()
    if manifest.runtime == "openvino":
        import_openvino()
        if not {"amx_bf16", "avx512_bf16"} & set(instruction_sets()):
            _log.warning(
                "%s: this processor has no bfloat16 instructions, so a %s engine runs in float32, slowly; "
                "an fp32 engine is faster here",
                path,
                manifest.precision,
            )
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"this onnxruntime {ort.__version__} has no {provider}, only "
            f"{', '.join(ort.get_available_providers())}; for the CPU: {INSTALL}"
        )
    return OrtEngine(path, manifest, threads or usable_cores(), provider)


def import_onnxruntime() -> Any:
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
    "tensor(bool)": "bool",
}


class OrtEngine:
    """All parts of an ONNX engine; encoder and joined pass are loaded when first used.

    Several threads may use it, each a denoiser and codec streams of its own.
    """

    def __init__(self, path: Path, manifest: Manifest, threads: int, provider: str) -> None:
        self.path = path
        self.manifest = manifest
        self.threads = threads
        self.provider = provider
        self._sessions: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._lock = Lock()
        self._closed = False
        # ONNX Runtime 1.31 and 1.32 refuse some int8 products with a bias otherwise.
        self._unwanted_optimizers = ["MatMulAddFusion"] if manifest.precision == "int8" else []
        weights = part_path(path, manifest, "weights") if "weights" in manifest.parts else path
        self._is_small = weights.stat().st_size < SMALL_BYTES
        # OpenVINO is faster at fixed sizes by a third. A window has few; without one they are too many.
        self._on_openvino = manifest.runtime == "openvino"
        # A large network cannot be held once for every size; its products are large at any.
        self._is_large = is_large(manifest.model)
        windowed = bool(manifest.cache.window_frames)
        self._fixes_sizes = self._on_openvino and windowed and not self._is_large
        for part in manifest.parts:
            late = (*_LATE, *_PASSES[: self._fixes_sizes], *late_parts(manifest))
            if self._is_large:
                late += ("prompt",)
            if part not in late:
                self.session(part)
        self.denoiser = self.new_denoiser()

    @property
    def device(self) -> str:
        name = f"{NAME} {self.manifest.precision}" if self._on_openvino else self.provider
        return f"{name}, {self.threads} {'thread' if self.threads == 1 else 'threads'}"

    def session(self, part: str, sizes: Mapping[str, int] | None = None) -> Any:
        """The onnxruntime session of `part`, created once (a large network's prompt part: when asked for).

        Args:
            part: of the engine.
            sizes: of the symbols in its shapes, for a provider that is faster when it knows them.

        Raises:
            EngineError: no such part, or it cannot be loaded or is not what the manifest says.
            BackendError: the provider refuses it, or the engine is closed.
        """
        fixed = sizes if sizes and self._fixes_sizes else {}
        key = part, tuple(fixed.values())
        with self._lock:  # of two threads, one loads
            found = self._sessions.get(key)
            if found is None:
                found = self._load(part, fixed)
                # A prompt takes a tenth of a large network's weights, once: they are not worth their memory.
                if not (self._is_large and part == "prompt"):
                    self._sessions[key] = found
            return found

    def _load(self, part: str, fixed: Mapping[str, int]) -> Any:
        if self._closed:
            raise BackendError(f"{self.path}: the engine is closed; open it again with asd_rt.open")
        file, spec = part_path(self.path, self.manifest, part), self.manifest.parts[part]
        ort, on_openvino = import_onnxruntime(), self._on_openvino and part in _PASSES
        try:
            if on_openvino:
                _log.info("compiling %s for %s", file, dict(fixed) or "any size")
                return OpenVinoSession(file, spec, self.threads, fixed, self._is_large)
            session = ort.InferenceSession(
                str(file),
                self._options(ort, part),
                providers=[self.provider],
                disabled_optimizers=self._unwanted_optimizers,
            )
        except (
            Exception
        ) as error:  # its exceptions share no base class; none may reach the user raw
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            runtime = NAME if on_openvino else f"ONNX Runtime {ort.__version__}"
            raise EngineError(
                f"{file}: {runtime} cannot load the {part} part ({first_line}); build it again with: "
                f"{REBUILD}"
            ) from error
        active = session.get_providers()
        if active[:1] != [self.provider]:
            raise BackendError(
                f"{file}: asked for {self.provider}, got {', '.join(active)}; the provider's libraries are "
                f"missing or there is no such device"
            )
        session.disable_fallback()
        for side, values, expected in (
            ("input", session.get_inputs(), spec.inputs),
            ("output", session.get_outputs(), spec.outputs),
        ):
            found = {v.name: _ELEMENT_TYPES.get(v.type, v.type) for v in values}
            _check_tensors(str(file), side, found, expected)
        _log.info("loaded %s (%s)", file, self.device)
        return session

    def _options(self, ort: Any, part: str) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, and said once
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Without VNNI, sums of two int8 products saturate in int16; this takes slower, exact ones there.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if (
            part in CODEC_GRAPHS
        ):  # else new caches are cut last, and all that they are cut from waits for it
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            options.enable_cpu_mem_arena = not has_large_codec(self.manifest)
        # Threads that wait actively between two calls of one part take the cores from another part:
        # those of the passes wait within a call only, those of small parts never.
        if part in _PASSES:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        else:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            codec = self.manifest.parts.get("codec_weights") if part in CODEC_GRAPHS else None
            is_small = self._is_small if codec is None else codec.bytes < SMALL_CODEC_BYTES
            if is_small:  # to wake threads takes longer than the part
                options.intra_op_num_threads = 1
        return options

    def run_part(self, part: str, output: str, **inputs: NDArray[Any]) -> NDArray[Any]:
        """Run a part with one output of interest."""
        session = self.session(part)
        with run_errors(f"{self.path}: {part}"):
            (result,) = session.run([output], inputs)
        return np.asarray(result)

    def new_denoiser(self) -> OrtDenoiser:
        return OrtDenoiser(self.path, self.manifest, self.session)

    def encode_prompt(self, tokens: NDArray[np.int64]) -> FloatArray:
        return self.run_part("text", "context", tokens=tokens)

    def new_codec_stream(self, part: str, latent_hw: tuple[int, int]) -> OrtCodecStream:
        """As `codec_stream`, whose streams share nothing anyway; the caller releases it."""
        return self.codec_stream(part, latent_hw)

    def codec_stream(self, part: str, latent_hw: tuple[int, int]) -> OrtCodecStream:
        part_path(self.path, self.manifest, part)  # raises where there is none
        return OrtCodecStream(self.path, self.manifest, part, latent_hw, self.session)

    def close(self) -> None:
        self._closed = True
        self.denoiser.release()
        self._sessions.clear()
