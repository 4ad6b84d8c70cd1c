"""One engine from checkpoint to folder: export, gate, compile, and move in as a whole."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import onnx

from asd_rt.errors import AsdError, EngineError
from asd_rt.manifest import (
    Manifest,
    Part,
    manifest_path,
    read_manifest,
    sha256_file,
    verify,
    write_manifest,
)
from export.bundle import replace_parts, write_part
from export.codec import CodecChoice, fill_codec
from export.onnx import export_part, serialize
from export.parity import measure
from export.parts import LOWERINGS, PartModule, engine_parts
from export.settings import Settings, make_manifest
from export.tensorrt import build_plan, import_tensorrt, profile_ranges
from export.weights import share_weights
from train.checkpoint import Checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What to build: backend (onnx, tensorrt, tensorrt_rtx), precision, and the cards of a plan."""

    backend: str
    precision: str
    gpus: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the engine file."""
        return f"asd_{self.precision}{self.suffix}"

    @property
    def runtime(self) -> str:
        """What runs the passes: onnxruntime, its provider openvino, or tensorrt."""
        if self.backend != "onnx":
            return "tensorrt"
        return "openvino" if self.precision == "bf16" else "onnxruntime"

    @property
    def suffix(self) -> str:
        return ".onnx" if self.backend == "onnx" else ".plan"


def plan_obstacle(settings: Settings, precision: str) -> str | None:
    """Why these settings cannot become a TensorRT plan; None = they can."""
    if precision == "fp32":
        return "TensorRT takes no fp32 attention; use --precision fp16"
    if precision == "bf16":
        return "a bf16 engine is for ONNX Runtime with OpenVINO; use --target onnx, or --precision fp16"
    if settings.latent_hw is None:
        return "a plan needs a fixed latent size, which this checkpoint does not say; use --latent-size HxW"
    if not settings.capacity_frames:
        return "a plan needs to know how long the cache gets; use --window-frames or --max-frames"
    return None


def build_engine(
    checkpoint: Checkpoint,
    settings: Settings,
    target: Target,
    out: Path,
    force: bool,
    codec: CodecChoice | None = None,
) -> Path:
    """Build one engine in a temporary folder, gate it, and move it into `out`; returns its path.

    An engine that is there already and up to date is left alone, but for a codec that differs.

    Args:
        checkpoint: the weights.
        settings: geometry, schedule and plan.
        target: backend, precision and cards.
        out: an existing folder.
        force: replace an engine that differs.
        codec: to be a part of it; None = the checkpoint's own, if any. An engine that is up to date keeps the
            one that it has.

    Raises:
        EngineError: `out` cannot be written, a differing engine is there, or the result fails its gate.
    """
    engine = out / target.file
    wanted = make_manifest(
        checkpoint, settings, target.precision, target.backend, _NO_PARTS, target.gpus
    )
    found = None if force else _current(engine, wanted)
    if found is not None:
        if codec is None or found.codec == codec.field:
            log.info("%s is up to date", engine)
        else:
            _replace_codec(engine, found, codec, LOWERINGS[target.runtime].opset)
        return engine
    log.info("building %s from checkpoint %s", engine, checkpoint.name)
    with _scratch(out) as scratch:
        began = perf_counter()
        manifest = _fill(scratch, checkpoint, settings, target)
        if codec is not None:
            manifest, _ = fill_codec(scratch, manifest, codec, LOWERINGS[target.runtime].opset)
        write_manifest(scratch / target.file, manifest)
        verify(scratch / target.file, manifest)
        _move_in(scratch, engine, manifest)
        size = sum(part.bytes for part in manifest.parts.values())
        log.info("wrote %s, %.1f MB in %d parts, %.0f s", engine, size / 1e6, len(manifest.parts),
                 perf_counter() - began)  # fmt: skip
    return engine


def _replace_codec(engine: Path, found: Manifest, codec: CodecChoice, opset: int) -> None:
    log.info("building the codec of %s from %s", engine, codec.codec.name)
    with _scratch(engine.parent) as scratch:
        manifest, made = fill_codec(scratch, found, codec, opset)
        replace_parts(engine, found, manifest, made, scratch)
        verify(engine, manifest)


_NO_PARTS = {name: Part(name, "0" * 64, 0) for name in ("denoiser", "time", "prompt")}


def _fill(scratch: Path, checkpoint: Checkpoint, settings: Settings, target: Target) -> Manifest:
    """Export, gate and, for a plan, compile every part into `scratch`; returns the manifest."""
    model = checkpoint.build_model()
    lowering = LOWERINGS[target.runtime]
    modules = engine_parts(checkpoint, model, target.precision, settings.latent_hw, lowering)
    graphs: dict[str, onnx.ModelProto] = {}
    for name, module in modules.items():
        began = perf_counter()
        graphs[name] = export_part(name, module, lowering.opset)
        log.info("  %-9s exported  %6.1f s", name, perf_counter() - began)
    stem = f"asd_{target.precision}"
    parts: dict[str, Part] = {}
    if target.backend == "onnx":
        file = scratch / f"{stem}.weights"
        share_weights(graphs.values(), file)
        parts["weights"] = Part(file.name, sha256_file(file), file.stat().st_size)
        log.info("  weights   %8.3f MB", parts["weights"].bytes / 1e6)
    for name, module in modules.items():
        parts[name] = _write(scratch, stem, name, ".onnx", serialize(graphs[name]), module)
    manifest = make_manifest(checkpoint, settings, target.precision, "onnx", parts)
    began = perf_counter()
    parity = measure(scratch / parts["denoiser"].file, manifest, checkpoint, model)
    log.info("  parity    pass %.1e, rollout %.1e (budgets %.0e, %.0e) %.1f s",
             max(parity["pass"].values()), max(parity["rollout"].values()), parity["budget"]["pass"],
             parity["budget"]["rollout"], perf_counter() - began)  # fmt: skip
    if target.backend == "onnx":
        return replace(manifest, parity=parity)

    trt, hw = import_tensorrt(), settings.latent_hw
    if hw is None:
        raise EngineError(f"{target.file}: {plan_obstacle(settings, target.precision)}")
    ranges = profile_ranges(settings.cache.block_frames, settings.capacity_frames, hw)
    for name, module in modules.items():
        began = perf_counter()
        plan = build_plan(trt, name, module, graphs[name], ranges, target.gpus)
        (scratch / parts[name].file).unlink()
        parts[name] = _write(scratch, f"asd_{target.precision}", name, ".plan", plan, module)
        log.info("  %-9s compiled  %8.3f MB %6.1f s  %s", name, parts[name].bytes / 1e6,
                 perf_counter() - began, ", ".join(target.gpus) or "this card")  # fmt: skip
    parity |= {
        "measured_with": f"{parity['measured_with']}, on the graphs that the plans were compiled from"
    }
    return make_manifest(
        checkpoint, settings, target.precision, target.backend, parts, target.gpus, parity
    )


def _write(
    folder: Path, stem: str, name: str, suffix: str, content: bytes, module: PartModule
) -> Part:
    file = folder / (f"{stem}{suffix}" if name == "denoiser" else f"{stem}.{name}{suffix}")
    file.write_bytes(content)
    return write_part(file, module)


def _current(engine: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of the engine that is there, if it is what would be built; None where there is none.

    Its codec may be another: that is built by itself.

    Raises:
        EngineError: it is there, whole or damaged, and would come out differently.
    """
    if not engine.exists() and not manifest_path(engine).exists():
        return None
    mend = "use --force to replace it, or --out for another folder"
    try:
        found = read_manifest(engine)
        verify(engine, found)
    except AsdError as error:
        raise EngineError(f"{engine}: exists but is damaged; {mend} ({error})") from error
    old, new = (
        {k: v for k, v in manifest.to_json().items() if k not in ("parts", "parity", "codec")}
        for manifest in (found, wanted)
    )
    differing = [key for key in new if old[key] != new[key]]
    if differing:
        raise EngineError(
            f"{engine}: exists and was built with another {', '.join(differing)}; {mend}"
        )
    return found


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A temporary folder inside `out`; nothing of it stays behind."""
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=out))
        yield scratch
    except OSError as error:
        raise EngineError(
            f"--out {out}: cannot be written ({error.strerror or error}); choose another folder or make room"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _move_in(scratch: Path, engine: Path, manifest: Manifest) -> None:
    """Put the finished files in place, the manifest last: until then the engine does not verify."""
    old = set(engine.parent.glob(f"{engine.stem}.*{engine.suffix}"))
    old |= set(engine.parent.glob(f"{engine.stem}.*weights"))
    manifest_path(engine).unlink(missing_ok=True)
    files = [part.file for part in manifest.parts.values()]
    for file in files:
        (scratch / file).chmod(0o644)
        (scratch / file).replace(engine.parent / file)
    for leftover in old - {engine.parent / file for file in files}:
        leftover.unlink()
    (scratch / manifest_path(engine).name).replace(manifest_path(engine))
