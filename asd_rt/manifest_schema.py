"""The schema of a manifest in code: docs/engine.md with every field checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from asd_rt.config import CacheConfig, ModelConfig, from_mapping
from asd_rt.errors import ConfigError, EngineError

FORMAT_VERSION = 4
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
BACKENDS = ("onnx", "tensorrt", "tensorrt_rtx")
RUNTIMES = ("onnxruntime", "openvino", "tensorrt")  # what runs the passes
CODEC_GRAPHS = ("decoder_first", "decoder", "encoder_first", "encoder")
CODEC_PARTS = (*CODEC_GRAPHS, "codec_weights")
PART_NAMES = (
    *("denoiser", "weights", "joined", "time", "prompt", "step"),
    *("text", "text_weights", "tokenizer"),
    *CODEC_PARTS,
    *("build_log", "text_log", "codec_log"),  # of a plan's builder, for people
)
CODEC_KINDS = ("linear", "wan", "taehv")
REQUIRED_PARTS = ("denoiser", "time", "prompt")
UMT5_PARTS = ("text", "text_weights", "tokenizer")
SCHEMA = "docs/engine.md"

_SHA256 = re.compile(r"[0-9a-f]{64}")

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor at a part's border: its dtype ("float32") and shape (sizes, or symbols such as "P")."""

    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or not isinstance(self.shape, tuple):
            raise EngineError(f"a tensor needs a dtype and a list as shape, found {self!r}")
        for size in self.shape:
            if isinstance(size, bool) or not isinstance(size, int | str):
                raise EngineError(f"a shape holds whole numbers and symbols, found {size!r}")

    def to_json(self) -> Json:
        return {"dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Part:
    """One file of the engine.

    Attributes:
        file: path relative to the manifest's folder.
        sha256: hash of the file, 64 hexadecimal digits.
        bytes: size of the file.
        inputs, outputs: tensors by name.
    """

    file: str
    sha256: str
    bytes: int
    inputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    outputs: Mapping[str, TensorSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = Path(self.file) if isinstance(self.file, str) else None
        if path is None or not self.file or path.is_absolute() or ".." in path.parts:
            raise EngineError(
                f"file must be a relative path that stays in its folder, found {self.file!r}"
            )
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise EngineError(f"sha256 must be 64 hexadecimal digits, found {self.sha256!r}")
        if isinstance(self.bytes, bool) or not isinstance(self.bytes, int) or self.bytes < 0:
            raise EngineError(f"bytes must be a whole number >= 0, found {self.bytes!r}")

    def to_json(self) -> Json:
        return {
            "file": self.file,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "inputs": {name: spec.to_json() for name, spec in self.inputs.items()},
            "outputs": {name: spec.to_json() for name, spec in self.outputs.items()},
        }


@dataclass(frozen=True)
class Manifest:
    """What an engine is. Fields and their JSON form: docs/engine.md.

    Attributes:
        name: of the engine ("asd_fp32").
        precision: fp32, fp16, bf16, int8 or fp8.
        backend: onnx, tensorrt or tensorrt_rtx.
        runtime: what the passes are lowered for: onnxruntime, openvino or tensorrt.
        model: hyper-parameters of the denoiser.
        cache: geometry of the KV cache.
        latent_hw: latent (rows, columns) that the engine is fixed to; None = any.
        timestep_shift: of the schedule.
        step_lists: {"1": {"timesteps": [...], "sigmas": [...]}, ...}, for readers without our code.
        default_plan: {"steps": n, "first_steps": m}.
        fps: frames a second of the decoded video.
        display_scale: whole factor by which frames are enlarged for viewing.
        tokenizer: None, {"kind": "vocabulary", "words": {word: id}} or {"kind": "umt5", "max_tokens": n}.
        parts: files by part name.
        codec: None, or {"kind": linear, wan or taehv; "spatial": pixels a latent pixel is wide; "temporal":
            frames a latent frame is long (the first is one)}.
        checkpoint: {"sha256", "name"} of the weights.
        tools: versions of what built it.
        gpus: ("sm89", ...), empty for onnx.
        parity: figures of the build's parity gate.
        sources: {part: {"name", "sha256", ...}} of parts that came from elsewhere than the checkpoint.
    """

    name: str
    precision: str
    backend: str
    model: ModelConfig
    cache: CacheConfig
    latent_hw: tuple[int, int] | None
    timestep_shift: float
    step_lists: Json
    default_plan: Mapping[str, int]
    fps: int
    display_scale: int
    tokenizer: Json | None
    parts: Mapping[str, Part]
    checkpoint: Json
    tools: Json
    runtime: str = "onnxruntime"
    gpus: tuple[str, ...] = ()
    parity: Json = field(default_factory=dict)
    sources: Json = field(default_factory=dict)
    codec: Json | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise EngineError(problem)

    def to_json(self) -> Json:
        """The JSON document, `format_version` first."""
        return {
            "format_version": self.format_version,
            "name": self.name,
            "precision": self.precision,
            "backend": self.backend,
            "runtime": self.runtime,
            "model": self.model.to_json(),
            "cache": self.cache.to_json(),
            "latent_hw": None if self.latent_hw is None else list(self.latent_hw),
            "timestep_shift": self.timestep_shift,
            "step_lists": self.step_lists,
            "default_plan": dict(self.default_plan),
            "fps": self.fps,
            "display_scale": self.display_scale,
            "tokenizer": self.tokenizer,
            "codec": self.codec,
            "parts": {name: part.to_json() for name, part in self.parts.items()},
            "checkpoint": self.checkpoint,
            "tools": self.tools,
            "gpus": list(self.gpus),
            "parity": self.parity,
            "sources": self.sources,
        }


def from_json(document: object) -> Manifest:
    """A manifest from its JSON document.

    Raises:
        AsdError: anything that is not exactly the schema of this format_version.
    """
    if not isinstance(document, dict):
        raise EngineError(f"expected a JSON object, found {type(document).__name__}")
    version = document.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > FORMAT_VERSION
        hint = (
            " (made by a newer asd-rt: upgrade it with pip install -U asd-rt, or)" if newer else ""
        )
        raise EngineError(f"expected format_version {FORMAT_VERSION}, found {version!r}{hint}")
    names = {f.name for f in fields(Manifest)}
    unknown, missing = sorted(set(document) - names), sorted(names - set(document))
    if unknown or missing:
        parts = [f"unknown fields {', '.join(unknown)}"] if unknown else []
        parts += [f"missing fields {', '.join(missing)}"] if missing else []
        raise EngineError(f"{' and '.join(parts)} (schema: {SCHEMA})")
    values = dict(document)
    values["model"] = _build(ModelConfig, _mapping(values["model"], "model"), "model")
    values["cache"] = _build(CacheConfig, _mapping(values["cache"], "cache"), "cache")
    values["parts"] = {
        name: _read_part(_mapping(part, f"parts.{name}"), f"parts.{name}")
        for name, part in _mapping(values["parts"], "parts").items()
    }
    return from_mapping(Manifest, values, "manifest")


def _build(cls: type[T], values: Json, where: str) -> T:
    """`from_mapping`, whose errors all say where and are errors of the engine."""
    try:
        return from_mapping(cls, values, where)
    except ConfigError as error:
        raise EngineError(str(error)) from error
    except EngineError as error:
        raise EngineError(f"{where}: {error}") from error


def _mapping(value: object, where: str) -> Json:
    if not isinstance(value, dict):
        raise EngineError(f"{where} must be an object, found {value!r}")
    return value


def _read_part(values: Json, where: str) -> Part:
    tensors = {
        side: {
            name: _build(TensorSpec, _mapping(spec, f"{where}.{name}"), f"{where}.{name}")
            for name, spec in _mapping(values.get(side), f"{where}.{side}").items()
        }
        for side in ("inputs", "outputs")
    }
    return _build(Part, values | tensors, where)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _problems(m: Manifest) -> list[str]:
    """What is wrong with the values of a manifest, worst first."""
    found: list[str] = []

    def check(good: bool, field_name: str, expected: str) -> None:
        if not good:
            found.append(
                f"{field_name} must be {expected}, found {getattr(m, field_name.split('.')[0])!r}"
            )

    check(m.format_version == FORMAT_VERSION, "format_version", str(FORMAT_VERSION))
    check(isinstance(m.name, str) and bool(m.name), "name", "a name")
    check(m.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
    check(m.backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}")
    check(m.runtime in RUNTIMES, "runtime", f"one of {', '.join(RUNTIMES)}")
    hw = m.latent_hw
    even = hw is None or (
        isinstance(hw, tuple) and len(hw) == 2 and all(_is_size(n) and n % 2 == 0 for n in hw)
    )
    check(even, "latent_hw", "null or two even sizes")
    shift = m.timestep_shift
    check(isinstance(shift, int | float) and not isinstance(shift, bool) and 0 < shift < float("inf"),
          "timestep_shift", "a number > 0")  # fmt: skip
    check(isinstance(m.step_lists, dict), "step_lists", "an object")
    plan = m.default_plan
    good_plan = isinstance(plan, Mapping) and set(plan) == {"steps", "first_steps"}
    check(good_plan and all(_is_size(n) and n <= 4 for n in plan.values()),
          "default_plan", '{"steps": 1..4, "first_steps": 1..4}')  # fmt: skip
    check(_is_size(m.fps), "fps", "a whole number >= 1")
    check(_is_size(m.display_scale), "display_scale", "a whole number >= 1")
    check(m.tokenizer is None or _is_vocabulary(m.tokenizer) or _is_umt5(m.tokenizer), "tokenizer",
          'null, {"kind": "vocabulary", "words": {}} or {"kind": "umt5", "max_tokens": n}')  # fmt: skip
    check(m.codec is None or _is_codec(m.codec), "codec",
          'null or {"kind": one of linear, wan, taehv; "spatial": n, "temporal": n}')  # fmt: skip
    check(
        isinstance(m.gpus, tuple) and all(isinstance(g, str) for g in m.gpus),
        "gpus",
        "a list of names",
    )
    for name in ("checkpoint", "tools", "parity", "sources"):
        check(isinstance(getattr(m, name), dict), name, "an object")
    if isinstance(m.sources, dict) and not all(map(_is_source, m.sources.values())):
        found.append(f'sources must name their "parts", found {m.sources!r}')
    if isinstance(m.checkpoint, dict) and "trained_frames" in m.checkpoint:
        whole = _is_size(m.checkpoint["trained_frames"])
        check(whole, "checkpoint", "an object whose trained_frames is a whole number >= 1")
    for name in m.parts:
        if name not in PART_NAMES:
            found.append(f"parts: unknown part {name}; known: {', '.join(PART_NAMES)}")
    required = REQUIRED_PARTS + (_umt5_parts(m) if _is_umt5(m.tokenizer) else ())
    missing = [name for name in required if name not in m.parts]
    if missing:
        found.append(f"parts: missing {', '.join(missing)}")
    if not found:
        found += _codec_problems(m)
    return found


def _umt5_parts(m: Manifest) -> tuple[str, ...]:
    """Parts of a UMT5 text encoder; a plan has its weights inside."""
    text = m.parts.get("text")
    inside = text is not None and text.file.endswith(".plan")
    return tuple(name for name in UMT5_PARTS if not (inside and name == "text_weights"))


def _codec_problems(m: Manifest) -> list[str]:
    """Where `codec` and the codec's parts do not go together."""
    graphs = [name for name in CODEC_GRAPHS if name in m.parts]
    if m.codec is None:
        return [f"codec: null, but there is a {graphs[0]} part"] if graphs else []
    if "decoder" not in m.parts:
        return ["parts: missing decoder, which codec describes"]
    first = m.codec["temporal"] > 1
    return [
        f"parts: {'missing' if first else 'unexpected'} {name}_first for a codec that makes "
        f"{m.codec['temporal']} frames of a latent frame"
        for name in ("decoder", "encoder")
        if name in m.parts and (f"{name}_first" in m.parts) != first
    ]


def _is_codec(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"kind", "spatial", "temporal"}
        and value["kind"] in CODEC_KINDS
        and _is_size(value["spatial"])
        and _is_size(value["temporal"])
    )


def _is_vocabulary(value: object) -> bool:
    if (
        not isinstance(value, dict)
        or set(value) != {"kind", "words"}
        or value["kind"] != "vocabulary"
    ):
        return False
    words = value["words"]
    return isinstance(words, dict) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in words.values()
    )


def _is_source(value: object) -> bool:
    parts = value.get("parts") if isinstance(value, dict) else None
    return isinstance(parts, list) and all(isinstance(name, str) for name in parts)


def _is_umt5(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"kind", "max_tokens"}:
        return False
    return value["kind"] == "umt5" and _is_size(value["max_tokens"])
