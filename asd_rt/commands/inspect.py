"""`asd-rt inspect`: what an engine is, without opening it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from asd_rt.arguments import default_frames
from asd_rt.bench import cache_bytes
from asd_rt.commands.common import Outcome, Problems, add_json, size_text, table
from asd_rt.errors import EngineError
from asd_rt.manifest import Manifest, accuracy_warning, check_part, read_manifest
from asd_rt.memory_report import memory_report, memory_text
from asd_rt.planner import USUAL_LATENT_HW, video_of

HELP = "show what an engine is and check its files"
EXAMPLES = """examples:
  asd-rt inspect engines/asd_fp32.onnx
  asd-rt inspect engines/asd_fp16.plan --json | jq .manifest.parity
  asd-rt inspect engines/asd_bf16.onnx --frames 21 --latent-size 60x104
      what memory such a video takes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `inspect`."""
    parser.add_argument("engine", metavar="PATH", help="engine file; its manifest lies beside it")
    parser.add_argument("--frames", metavar="N", help="latent frames to plan memory for")
    parser.add_argument(
        "--latent-size",
        metavar="HxW",
        help="latents to plan memory for, where the engine fixes none",
    )
    add_json(parser)


def execute(args: argparse.Namespace) -> Outcome:
    """Read the manifest and check every file against it; exit code 1 when one does not match.

    Raises:
        EngineError: no such engine, or no readable manifest.
    """
    path = Path(args.engine)
    flags = Problems()
    asked_frames = flags.integer("--frames", args.frames, 1)
    asked_hw = flags.latent_size("--latent-size", args.latent_size)
    flags.raise_any()
    manifest = read_manifest(path)
    problems = {name: _problem(path, manifest, name) for name in manifest.parts}
    frames = asked_frames or default_frames(manifest)
    video = video_of(manifest, frames, manifest.latent_hw or asked_hw or USUAL_LATENT_HW)
    damaged = [line for line in problems.values() if line]
    document = {
        "engine": str(path),
        "manifest": manifest.to_json(),
        "files_ok": not damaged,
        "problems": {name: line for name, line in problems.items() if line},
        "inaccurate": accuracy_warning(path, manifest),
        "bytes": sum(part.bytes for part in manifest.parts.values()),
        "cache": {
            "frames": frames,
            "tokens_per_frame": _tokens_per_frame(manifest),
            "bytes": cache_bytes(manifest, frames),
        },
        "memory": memory_report(video),
    }
    return Outcome(document, _text(document, manifest, problems), code=1 if damaged else 0)


def _problem(path: Path, manifest: Manifest, part: str) -> str | None:
    """What is wrong with the file of `part`, None when nothing is."""
    try:
        check_part(path, manifest, part)
    except EngineError as error:
        return str(error)
    return None


def _tokens_per_frame(manifest: Manifest) -> int | None:
    hw = manifest.latent_hw
    return None if hw is None else hw[0] * hw[1] // 4


def _text(document: dict[str, Any], manifest: Manifest, problems: dict[str, str | None]) -> str:
    model, cache, plan = manifest.model, manifest.cache, manifest.default_plan
    hw, figures = manifest.latent_hw, document["cache"]
    window = (
        f"window {cache.window_frames}, sink {cache.sink_frames}"
        if cache.window_frames
        else "no window"
    )
    held = (
        f", at most {cache.max_frames} frames"
        if cache.max_frames and not cache.window_frames
        else ""
    )
    memory = (
        ""
        if figures["bytes"] is None
        else f", {size_text(figures['bytes'])} for {figures['frames']} frames"
    )
    size = (
        "any size"
        if hw is None
        else f"{hw[0]}x{hw[1]} ({figures['tokens_per_frame']} tokens a frame)"
    )
    rows = [
        ("engine", f"{document['engine']} ({size_text(document['bytes'])})"),
        *([("warning", document["inaccurate"])] if document["inaccurate"] else []),
        ("backend", " ".join([manifest.backend, manifest.precision, *manifest.gpus])),
        (
            "model",
            f"dim {model.dim}, {model.num_layers} layers, {model.num_heads} heads, ffn {model.ffn_dim}",
        ),
        ("latents", f"{model.in_dim} channels, {size}"),
        ("KV cache", f"blocks of {cache.block_frames} frames, {window}{held}{memory}"),
        (
            "plan",
            f"{plan['first_steps']} steps, then {plan['steps']}; shift {manifest.timestep_shift:g}",
        ),
        ("video", _video(manifest)),
        ("prompts", _prompts(manifest)),
        ("checkpoint", " ".join(_flatten(manifest.checkpoint))),
        ("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
        ("parity", ", ".join(_flatten(manifest.parity)) or "not measured"),
    ]
    for name, part in manifest.parts.items():
        state = problems[name] or f"ok, {size_text(part.bytes)}, sha256 {part.sha256[:16]}..."
        rows.append((f"part {name}", f"{part.file}: {state}" if not problems[name] else state))
    return f"{table(rows)}\n\n{memory_text(document['memory'])}"


def _video(manifest: Manifest) -> str:
    codec = manifest.codec
    if codec is None:
        return "none: makes latents (asd-rt replay)"
    shown = f"{manifest.fps} frames a second, shown {manifest.display_scale} times as large"
    if codec["temporal"] > 1:
        shown += f", {codec['temporal']} for each latent frame but the first"
    source = f" {codec['name']} {codec['precision']}" if "name" in codec else ""
    return f"{shown}; {codec['kind']} codec{source}, {codec['spatial']} pixels a latent pixel"


def _prompts(manifest: Manifest) -> str:
    if manifest.tokenizer is None:
        return "none: takes embeddings (--prompt-embeds)"
    if manifest.tokenizer["kind"] == "umt5":
        return f"UMT5, at most {manifest.tokenizer['max_tokens']} tokens that count"
    return f"{len(manifest.tokenizer['words'])} words, at most {manifest.model.text_len} that count"


def _flatten(figures: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested figures as "name value"."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += _flatten(value, f"{prefix}{name}.")
        else:
            lines.append(
                f"{prefix}{name} {value:.3g}"
                if isinstance(value, float)
                else f"{prefix}{name} {value}"
            )
    return lines
