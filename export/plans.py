"""The plan half of a build: graphs that passed their gate become plans, with a log of what was built."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from asd_rt.config import ModelConfig
from asd_rt.errors import ConfigError, EngineError
from asd_rt.manifest import Manifest, Part, sha256_file
from export.bundle import write_part
from export.settings import Settings
from export.tensorrt import Plan, Range, build_plan, import_tensorrt, profile_ranges

log = logging.getLogger(__name__)

BUILD_LOG = "build_log"  # part of the manifest
HEAD_CHANNELS = 256  # that a fused attention takes
FP8_FROM = 89  # compute capability, times 10


def plan_obstacle(settings: Settings, precision: str, model: ModelConfig) -> str | None:
    """Why these settings cannot become a TensorRT plan; None = they can."""
    if precision == "fp32":
        return "TensorRT takes no fp32 attention; use --precision fp16"
    if settings.latent_hw is None:
        return "a plan needs a fixed latent size, which this checkpoint does not say; use --latent-size HxW"
    if not settings.capacity_frames:
        return "a plan needs to know how long the cache gets; use --window-frames or --max-frames"
    if model.head_dim > HEAD_CHANNELS:
        return (
            f"TensorRT fuses attention of heads of at most {HEAD_CHANNELS} channels, this network has "
            f"{model.head_dim}; use --target onnx"
        )
    return None


def check_fp8(gpus: Sequence[str]) -> None:
    """Refuse cards that have no products of fp8.

    Raises:
        ConfigError: with their names.
    """
    without = [gpu for gpu in gpus if int(gpu.removeprefix("sm")) < FP8_FROM]
    if without:
        raise ConfigError(
            f"--precision fp8: {', '.join(without)} cannot compute in fp8, only cards from sm{FP8_FROM} on; "
            "leave out with --gpu sm89,sm120, or use --precision int8"
        )


def compile_plans(
    scratch: Path, engine: str, settings: Settings, graphs: Mapping[str, Part], gpus: Sequence[str]
) -> dict[str, Part]:
    """Replace the graphs in `scratch` by plans, and write the log of their builder beside them.

    Args:
        scratch: folder with the graphs and their weights.
        engine: name of the engine file, "asd_int8.plan".
        settings: with a latent size and a capacity; see `plan_obstacle`.
        graphs: parts as ONNX, by name.
        gpus: targets such as "sm89"; empty = the present card.

    Returns:
        the plans by the same names, and the log as `BUILD_LOG`.

    Raises:
        EngineError: see `export.tensorrt.build_plan`.
    """
    trt, hw = import_tensorrt(), settings.latent_hw
    if hw is None:
        raise EngineError(f"{engine}: a plan needs a fixed latent size; use --latent-size HxW")
    ranges = profile_ranges(settings.cache.block_frames, settings.capacity_frames, hw)
    parts, told = {}, {}
    for name, part in graphs.items():
        file = scratch / part.file
        plan = _compile(trt, name, file, part, ranges, gpus)
        file = file.with_suffix(".plan")
        file.write_bytes(plan.content)
        parts[name] = Part(
            file.name, sha256_file(file), file.stat().st_size, part.inputs, part.outputs
        )
        told[name] = _told(plan, parts[name], ranges)
    file = scratch / f"{engine}.log.json"
    file.write_bytes(_log_bytes(trt, engine, gpus, told))
    parts[BUILD_LOG] = Part(file.name, sha256_file(file), file.stat().st_size)
    return parts


def compile_added(
    folder: Path,
    manifest: Manifest,
    key: str,
    graphs: Mapping[str, Part],
    ranges: Mapping[str, Range],
) -> dict[str, Part]:
    """Plans of parts that are added to the engine of a plan, in the place of their graphs in `folder`.

    Args:
        folder: with the graphs and their weights.
        manifest: of the engine; its cards are theirs.
        key: of their source in the manifest ("codec"); their log is the part "codec_log".
        graphs: parts as ONNX, by name.
        ranges: of every symbol in their shapes.

    Returns:
        the plans by the same names, and the log.

    Raises:
        EngineError: see `export.tensorrt.build_plan`.
    """
    trt, parts, told = import_tensorrt(), {}, {}
    for name, part in graphs.items():
        file = folder / part.file
        plan = _compile(trt, name, file, part, ranges, manifest.gpus)
        stem, border = f"{manifest.name}_{name}", {"inputs": part.inputs, "outputs": part.outputs}
        parts[name] = write_part(folder, stem, ".plan", plan.content, **border)
        told[name] = _told(plan, parts[name], ranges)
    content = _log_bytes(trt, f"{manifest.name}.plan", manifest.gpus, told)
    parts[f"{key}_log"] = write_part(folder, f"{manifest.name}_{key}", ".log.json", content)
    return parts


def _compile(
    trt: ModuleType,
    name: str,
    file: Path,
    part: Part,
    ranges: Mapping[str, Range],
    gpus: Sequence[str],
) -> Plan:
    """The plan of one graph, which then is deleted."""
    plan = build_plan(trt, name, file, part.inputs, ranges, gpus)
    file.unlink()
    proved = ", ".join(f"{n} {k.replace('_', ' ')}" for k, n in plan.proved.items() if n)
    log.info("  %-13s compiled  %8.3f MB %6.1f s  %s%s", name, len(plan.content) / 1e6, plan.seconds,
             ", ".join(gpus) or "this card", f"; {proved}" if proved else "")  # fmt: skip
    return plan


def _log_bytes(trt: ModuleType, engine: str, gpus: Sequence[str], told: Mapping[str, Any]) -> bytes:
    """The log of a builder, as a file."""
    document = {
        "format_version": 1,
        "engine": engine,
        "builder": trt.__name__,
        "version": str(trt.__version__),
        "gpus": list(gpus),
        "settings": {"strongly_typed": True, "profiling_verbosity": "detailed"},
        "parts": told,
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def _told(plan: Plan, part: Part, ranges: Mapping[str, Range]) -> dict[str, Any]:
    """What the log says of one part."""
    symbols = {n for spec in part.inputs.values() for n in spec.shape if isinstance(n, str)}
    return {
        "seconds": round(plan.seconds, 3),
        "bytes": part.bytes,
        "ranges": {n: list(sizes) for n, sizes in ranges.items() if n in symbols},
        **plan.proved,
        "layers": [layer.to_json() for layer in plan.layers],
    }
