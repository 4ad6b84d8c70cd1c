"""The parts of a video codec: graphs with explicit feature caches, their gate, and their files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from asd_rt.backends.ort_codec import OrtCodecStream
from asd_rt.decoding import NEW, SIDES, STATE, Decoder, Encoder
from asd_rt.errors import ConfigError, EngineError
from asd_rt.manifest import Manifest, Part, TensorSpec, read_manifest, sha256_file
from asd_rt.manifest_schema import CODEC_PARTS, Json
from export.bundle import content_name, is_added, replace_parts, scratch_folder, write_part
from export.lowering import LOWERINGS
from export.onnx import export_part, serialize, tensor_specs
from export.parts import PartModule, TensorShape
from export.plans import compile_added
from export.weights import WeightsFile, name_weights
from train.vae_weights import VideoCodec

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16")
# Largest differences from float32 torch, of frames in -1..1 and of latents of unit variance.
BUDGETS = {"fp32": 1e-3, "fp16": 5e-2}
SIZES = ((4, 6), (6, 4))  # latents that the gate tries; the graphs serve any size


@dataclass(frozen=True, slots=True)
class CodecChoice:
    """A codec and how its weights and caches are stored: float32, or float16 and computed in float32."""

    codec: VideoCodec
    precision: str

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"--vae-precision must be {' or '.join(PRECISIONS)}, found {self.precision}"
            )

    @property
    def field(self) -> Json:
        """`codec` of a manifest."""
        codec = self.codec
        return {
            "kind": codec.kind,
            "spatial": codec.spatial,
            "temporal": codec.temporal,
        }


class CodecPart(nn.Module):
    """A step of a codec over tensors [1, F, ...], with its caches in `state` and among the results."""

    def __init__(self, step: nn.Module, is_first: bool, half: bool) -> None:
        super().__init__()
        self.step, self._is_first, self._half = step, is_first, half

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, made = self.step(x[0], None if self._is_first else [cache.float() for cache in state])
        return y.unsqueeze(0), *(cache.half() if self._half else cache for cache in made)


@torch.inference_mode()
def codec_parts(choice: CodecChoice) -> dict[str, PartModule]:
    """Graphs of the codec by part name, for any latent size."""
    codec, half = choice.codec, choice.precision == "fp16"
    times, scale = codec.temporal, codec.spatial
    pixels = (3, f"{scale}h", f"{scale}w")
    shapes = {"latents": (codec.channels, "h", "w"), "frames": pixels}
    counts = {"latents": "F", "frames": f"{times}F"}
    parts = {}
    for name, step in (("decoder", codec.decoder), ("encoder", codec.encoder)):
        if step is None:
            continue
        size = (2, 4) if name == "decoder" else (2 * scale, 4 * scale)
        channels = codec.channels if name == "decoder" else 3
        _, caches = step(torch.zeros(1, channels, *size), None)
        kind = torch.float16 if half else torch.float32
        states: dict[str, TensorShape] = {
            f"{STATE}{i}": (kind, _cache_shape(cache)) for i, cache in enumerate(caches)
        }
        fresh = {f"{NEW}{key}": spec for key, spec in states.items()}
        given, made = SIDES[name]
        for first in (True, False):
            sides = {
                side: (torch.float32, (1, 1 if first else counts[side], *shapes[side]))
                for side in SIDES[name]
            }
            parts[f"{name}_first" if first else name] = PartModule(
                CodecPart(step, first, half).eval(),
                {given: sides[given]} | ({} if first else states),
                {made: sides[made]} | fresh,
            )
    return parts


def _cache_shape(cache: Tensor) -> tuple[int | str, ...]:
    """Shape of a cache that was made at latents of 2x4, in terms of h and w."""
    frames, channels, rows, columns = cache.shape
    named = [
        symbol if size == base else f"{size // base}{symbol}"
        for size, base, symbol in ((rows, 2, "h"), (columns, 4, "w"))
    ]
    return (frames, channels, *named)


def check_codec(codec: VideoCodec, channels: int, where: str) -> None:
    """Refuse a codec whose latents are not the denoiser's.

    Raises:
        ConfigError: another number of channels.
    """
    if codec.channels != channels:
        raise ConfigError(
            f"--vae {codec.name}: decodes latents of {codec.channels} channels, but {where} makes "
            f"{channels}; name the codec that it was trained with"
        )


def add_codec(choice: CodecChoice, engines: Sequence[Path], force: bool) -> None:
    """Make the codec a part of each of `engines`; one that has it already is left alone.

    Args:
        choice: the codec, for these engines by `check_codec`.
        engines: engine files.
        force: build it again even where it is there.

    Raises:
        EngineError: a part cannot be exported or compiled, exceeds its budget, or cannot be written.
    """
    codec = choice.codec
    modules = codec_parts(choice)
    for engine in engines:
        manifest = read_manifest(engine)
        weights = ["codec_weights" if manifest.backend == "onnx" else "codec_log"]
        told = {
            "name": codec.name,
            "sha256": codec.sha256,
            "precision": choice.precision,
            "parts": [*weights, *modules],
        }
        if not force and is_added(engine, "codec", told):
            log.info("%s: its codec is up to date", engine)
            continue
        log.info("building the codec of %s from %s", engine, codec.name)
        with scratch_folder(engine.parent) as scratch:
            parts, figures = _write(scratch, manifest, choice, modules)
            replace_parts(engine, "codec", told, parts, figures, scratch, codec=choice.field)
        log.info("%s: wrote its codec, %.1f MB", engine,
                 sum(part.bytes for part in parts.values()) / 1e6)  # fmt: skip


def _write(
    folder: Path, manifest: Manifest, choice: CodecChoice, modules: Mapping[str, PartModule]
) -> tuple[dict[str, Part], dict[str, Any]]:
    """Export the codec's parts into `folder`, gate them, and compile them where the engine is a plan."""
    is_plan, graphs = manifest.backend != "onnx", {}
    opset = LOWERINGS["tensorrt" if is_plan else "onnxruntime"].opset
    file = folder / "codec.weights"
    rounded = "fp16" if choice.precision == "fp16" else ""
    with WeightsFile(file) as weights:
        for name, module in modules.items():
            began = perf_counter()
            graphs[name] = export_part(name, module, opset, weights, rounded)
            log.info("  %-13s exported %6.1f s", name, perf_counter() - began)
    stem = f"{choice.codec.kind}_{choice.precision}"
    digest = sha256_file(file)
    file = file.rename(folder / content_name(stem, digest, ".weights"))
    name_weights(graphs.values(), file)
    parts = {"codec_weights": Part(file.name, digest, file.stat().st_size)}
    for name, module in modules.items():
        content = serialize(graphs[name])
        parts[name] = write_part(folder, f"{stem}_{name}", ".onnx", content, **_border(module))
    made = replace(
        manifest,
        parts={k: v for k, v in manifest.parts.items() if k not in CODEC_PARTS} | parts,
        codec=choice.field,
    )
    figures = measure_codec(folder, made, choice)
    log.info("  codec parity  %s (budget %.0e)",
             ", ".join(f"{k} {v:.1e}" for k, v in figures["largest"].items()), figures["budget"])  # fmt: skip
    return _compile(folder, made, modules) if is_plan else parts, figures


def _border(module: PartModule) -> dict[str, dict[str, TensorSpec]]:
    return {"inputs": tensor_specs(module.inputs), "outputs": tensor_specs(module.outputs)}


def _compile(folder: Path, manifest: Manifest, modules: Iterable[str]) -> dict[str, Part]:
    """Plans in place of the ONNX files, for the engine's one latent size."""
    hw = manifest.latent_hw
    if hw is None:
        raise EngineError(f"{manifest.name}: a plan needs a fixed latent size; use --latent-size")
    block = manifest.cache.block_frames
    factors = {1, 2, 4, *((manifest.codec or {})[key] for key in ("spatial", "temporal"))}
    ranges = {
        f"{factor if factor > 1 else ''}{symbol}": tuple(factor * n for n in sizes)
        for symbol, sizes in (("F", (1, block, block)), ("h", (hw[0],) * 3), ("w", (hw[1],) * 3))
        for factor in factors
    }
    graphs = {name: manifest.parts[name] for name in modules}
    return compile_added(folder, manifest, "codec", graphs, ranges)


class _Parts:
    """The codec's parts in `folder` as far as `asd_rt.decoding` needs an engine."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._sessions: dict[str, Any] = {}

    def codec_stream(self, part: str, latent_hw: tuple[int, int]) -> OrtCodecStream:
        return OrtCodecStream(self.folder, self.manifest, part, latent_hw, self._session)

    def _session(self, part: str) -> Any:
        if part not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            self._sessions[part] = onnxruntime.InferenceSession(
                str(self.folder / self.manifest.parts[part].file),
                options,
                providers=["CPUExecutionProvider"],
            )
        return self._sessions[part]


@torch.inference_mode()
def measure_codec(folder: Path, manifest: Manifest, choice: CodecChoice) -> dict[str, Any]:
    """Stream blocks through the parts in `folder` and through float32 torch.

    Returns:
        figures for the manifest: the largest absolute difference of each direction.

    Raises:
        EngineError: a figure exceeds the budget.
    """
    codec, block = choice.codec, manifest.cache.block_frames
    draw, engine = torch.Generator().manual_seed(0), _Parts(folder, manifest)
    largest = {name: 0.0 for name in ("decoder", "encoder") if name in manifest.parts}
    for hw in SIZES:
        latents = torch.randn((3 * block, codec.channels, *hw), generator=draw)
        frames = torch.cat(_stream(codec.decoder, latents, 1))
        decoder = Decoder(engine, hw)  # type: ignore[arg-type]
        found = [
            decoder.decode(latents[None, i : i + block].numpy()).copy()
            for i in range(0, len(latents), block)
        ]
        largest["decoder"] = max(largest["decoder"], _apart(found, frames))
        if codec.encoder is not None:
            expected = torch.cat(_stream(codec.encoder, frames, codec.temporal))
            encoder = Encoder(engine, hw)  # type: ignore[arg-type]
            found = [encoder.encode(frames[None].numpy())]
            largest["encoder"] = max(largest["encoder"], _apart(found, expected))
    budget = BUDGETS[choice.precision]
    failed = [f"{name} {value:.1e}" for name, value in largest.items() if not value <= budget]
    if failed:
        advised = "name another codec" if choice.precision == "fp32" else "use --vae-precision fp32"
        raise EngineError(
            f"--vae {codec.name}: parity with float32 torch failed (largest difference {', '.join(failed)}, "
            f"budget {budget:.0e}); it was not added to {manifest.name}; {advised}"
        )
    return {
        "metric": "largest absolute difference from float32 torch",
        "budget": budget,
        "largest": {name: float(f"{value:.3g}") for name, value in largest.items()},
    }


def _stream(step: nn.Module, x: Tensor, size: int) -> list[Tensor]:
    """A first frame, then `size` at a time."""
    y, caches = step(x[:1], None)
    made = [y]
    for start in range(1, len(x), size):
        y, caches = step(x[start : start + size], caches)
        made.append(y)
    return made


def _apart(found: Sequence[NDArray[np.float32]], expected: Tensor) -> float:
    whole = np.concatenate(found, axis=1)[0]
    if whole.shape != tuple(expected.shape) or not np.isfinite(whole).all():
        return float("inf")
    return float(np.abs(whole - expected.numpy()).max())
