"""What every inference backend offers. The frame loop and the session know nothing else of an engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from asd_rt.engines import DEVICES, has_nvidia_driver
from asd_rt.errors import BackendError, ConfigError
from asd_rt.fitting import MIN_LATENT, check_fits
from asd_rt.kv_cache import Move
from asd_rt.manifest import Manifest, accuracy_warning, late_parts, read_manifest, verify

FloatArray = NDArray[np.float32]
_log = logging.getLogger(__name__)


class Denoiser(Protocol):
    """One causal pass with a static KV cache that the denoiser owns.

    Order of calls: `prepare`, `set_prompt`, then per block `move` and any number of `denoise`. A pass
    attends to the first `past_frames` slots and to itself, and writes its keys and values into the slots
    right behind them; the next pass of the same block overwrites them.
    """

    def prepare(self, batch: int, latent_hw: tuple[int, int], capacity_frames: int) -> None:
        """Allocate the KV cache (or reuse one of the same size) and forget prompt and past.

        Args:
            batch: videos generated together.
            latent_hw: latent (rows, columns), both even.
            capacity_frames: slots of every cache buffer, the current block's included.

        Raises:
            BackendError: the engine is fixed to other sizes, or memory does not suffice.
        """

    def set_prompt(self, context: FloatArray) -> None:
        """Compute the cross-attention keys and values of `context` [B, text_len, text_dim]."""

    def denoise(
        self, latents: FloatArray, timestep: float, frames: range, past_frames: int
    ) -> FloatArray:
        """Run one pass.

        Args:
            latents: float32 [B, F, C, h, w].
            timestep: 0..1000, the same for all frames of the pass.
            frames: absolute indices of the F frames.
            past_frames: valid slots before this block.

        Returns:
            flow, float32 [B, F, C, h, w]; valid until the next pass.
        """

    @property
    def can_join(self) -> bool:
        """Whether `denoise_joined` is there."""

    def denoise_joined(
        self,
        clean: FloatArray,
        noisy: FloatArray,
        timestep: float,
        frames: range,
        past_frames: int,
        hidden: Sequence[int],
    ) -> FloatArray:
        """The cache pass of one block and the first pass of the next, in one.

        The clean block sees the first `past_frames` slots and itself; the noisy one sees the same and the
        clean block, without the `hidden` slots, and itself. Keys and values of the clean block are written
        behind the past, those of the noisy block behind them: `prepare` must leave room for both.

        Args:
            clean: result of a block, float32 [B, F, C, h, w], at timestep 0.
            noisy: first input of the block after it, of the same shape.
            timestep: of the noisy block.
            frames: absolute indices of both blocks' frames.
            past_frames: valid slots before the clean block.
            hidden: slots, up to those of the clean block, that the noisy block does not see.

        Returns:
            flow of the noisy block; valid until the next pass.
        """

    def move(self, moves: Sequence[Move]) -> None:
        """Copy frames between slots in every layer's keys and values."""

    def read_cache(self, layer: int, slots: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """Copies of the keys and values in `slots` (in that order), each float32 [B, tokens, H, D]."""


class CodecStream(Protocol):
    """One direction of the codec for one video: a step, and the feature caches that it keeps in place."""

    @property
    def frame_hw(self) -> tuple[int, int]:
        """Rows and columns of a frame, in pixels."""

    def step(self, given: FloatArray, made: FloatArray, first: bool) -> None:
        """Run one step.

        Args:
            given: float32, contiguous: latents [1, F, C, h, w] of a decoder, frames [1, F, 3, rows, columns]
                of an encoder.
            made: float32, contiguous, to be filled: the other kind.
            first: begin a video, of which this is the first frame alone; never so for a codec that is one
                frame long.
        """


class Engine(Protocol):
    """An opened engine: the denoiser, the parts around it, and what they run on."""

    @property
    def path(self) -> Path: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def denoiser(self) -> Denoiser: ...

    @property
    def device(self) -> str:
        """What it runs on, for reports ("CPUExecutionProvider, 2 threads")."""

    def encode_prompt(self, tokens: NDArray[np.int64]) -> FloatArray:
        """Token ids [B, text_len] -> context [B, text_len, text_dim]."""

    def codec_stream(self, part: str, latent_hw: tuple[int, int]) -> CodecStream:
        """The part "decoder" or "encoder" for one video with latents of this size.

        Raises:
            EngineError: the engine has no such part.
            BackendError: it is fixed to another size.
        """

    def close(self) -> None:
        """Release everything; an engine is of no use afterwards. May be called twice."""


def open_backend(path: str | Path, threads: int | None = None, device: str = DEVICES[0]) -> Engine:
    """Open an engine with the backend that its manifest names, after checking its files' hashes.

    Args:
        path: the engine file; its manifest lies beside it.
        threads: of a CPU backend; None = the usable cores.
        device: one of DEVICES. "auto" takes the card for an ONNX engine where a driver is loaded and ONNX
            Runtime has CUDA; what is asked for by name is that or an error.

    Raises:
        EngineError: engine or manifest is absent or damaged.
        BackendError: the backend is not installed or cannot run here.
        ConfigError: this machine has not the memory for it, or there is no such device.
    """
    if device not in DEVICES:
        raise ConfigError(f"device must be one of {', '.join(DEVICES)}, found {device!r}")
    engine = Path(path)
    manifest = read_manifest(engine)
    # The least that it will ever need; what a video needs is checked when one is asked for.
    check_fits(engine, manifest, 1, manifest.latent_hw or (MIN_LATENT, MIN_LATENT))
    verify(engine, manifest, skip=late_parts(manifest))
    warning = accuracy_warning(engine, manifest)
    if warning:
        _log.warning("%s", warning)
    if runs_on_cpu(engine, manifest, device):
        from asd_rt.backends import ort

        return ort.open_engine(engine, manifest, threads)
    if threads is not None:
        raise BackendError(
            f"{engine}: threads are those of a CPU, but this engine runs on a GPU; leave --threads out"
        )
    if manifest.backend == "onnx":
        from asd_rt.backends import ort_cuda

        return ort_cuda.open_engine(engine, manifest)
    if device == "cpu":
        raise BackendError(
            f"{engine}: a plan runs on an NVIDIA card alone; leave --device out, or take an .onnx engine"
        )
    from asd_rt.backends import tensorrt

    return tensorrt.open_engine(engine, manifest)


def runs_on_cpu(engine: Path, manifest: Manifest, device: str) -> bool:
    """Whether `open_backend` opens it on the CPU; said aloud where there is a card that cannot be used."""
    if manifest.backend != "onnx" or device == "cuda":
        return False
    if device == "cpu" or not has_nvidia_driver() or manifest.runtime == "openvino":
        return True
    from asd_rt.backends import cuda, ort_cuda

    if ort_cuda.is_available():
        try:
            cuda.present_gpu()
        except BackendError as error:
            _log.warning("%s: runs on the CPU though there is an NVIDIA driver: %s", engine, error)
            return True
        return False
    _log.warning(
        "%s: runs on the CPU though there is an NVIDIA driver, for this onnxruntime has no CUDA; %s",
        engine,
        ort_cuda.INSTALL,
    )
    return True
