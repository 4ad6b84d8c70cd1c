"""A network of real size from checkpoint to one block of video: real-size.json and .md.

python -m benchmarks.real_size --out out              # 1.3B at 480x832: half an hour, 19 GB, 15 GB of disk
python -m benchmarks.real_size --out out --layers 4 --only bf16,plan,int8plan

Weights are random. Every stage is a process of its own, whose time and peak memory are taken when it ends:
the checkpoint, the builds, `asd-rt replay` of one block, and PyTorch on the same noise. Engines stay in
OUT/real-size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from asd_rt import timing
from asd_rt.config import CacheConfig, ModelConfig
from asd_rt.errors import AsdError, EngineError
from asd_rt.files import make_folder, replacing
from asd_rt.manifest import read_manifest
from asd_rt.plan import FixedPlan
from asd_rt.planner import Video, plan_memory
from asd_rt.progress import Progress
from asd_rt.session import Session
from benchmarks.torch_loop import WAYS, TorchLoopDenoiser
from export.reference import TorchEngine
from train.checkpoint import load_checkpoint, weight_shapes

WAN = ModelConfig(
    dim=1536, ffn_dim=8960, freq_dim=256, text_dim=4096, text_len=512, in_dim=16, out_dim=16,
    num_heads=12, num_layers=30,
)  # fmt: skip
LATENT_HW, SMALL_HW = (60, 104), (16, 28)
FRAMES = 3
RUNS = {
    "bf16": LATENT_HW,
    "fp32": SMALL_HW,
}  # latents that an engine of this precision is played at
PLANS = {"plan": "fp16", "int8plan": "int8"}  # built, not played: this needs no card


def write_checkpoint(folder: Path, layers: int) -> None:
    """A random network of the 1.3B shape, stored in bfloat16 as such checkpoints are."""
    config = ModelConfig(**{**WAN.to_json(), "num_layers": layers, "patch_size": (1, 2, 2)})
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in weight_shapes(config).items():
        noise = torch.randn(shape, generator=draw)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif len(shape) == 1:
            noise *= 0.02
        else:
            noise *= shape[-1] ** -0.5 if "modulation" in name else noise[0].numel() ** -0.5
        weights[name] = noise.bfloat16()
    folder.mkdir()
    save_torch(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_json()))


def write_inputs(file: Path, latent_hw: tuple[int, int]) -> None:
    """Noise of one block, and a prompt's embedding."""
    draw = np.random.default_rng(0)
    shapes = {
        "noise": (1, FRAMES, WAN.in_dim, *latent_hw),
        "context": (1, WAN.text_len, WAN.text_dim),
    }
    tensors = {key: draw.standard_normal(s).astype(np.float32) for key, s in shapes.items()}
    save_file(tensors, file)


def run_torch(folder: Path, precision: str) -> None:
    """The same block in PyTorch: eager float32, and for a bf16 engine eager bfloat16 too."""
    checkpoint = load_checkpoint(folder / "checkpoint")
    manifest = read_manifest(folder / f"asd_{precision}.onnx")
    engine = TorchEngine(checkpoint, manifest)
    model = engine.denoiser.model  # type: ignore[attr-defined]
    inputs = load_file(folder / f"inputs-{precision}.safetensors")
    results = {}
    for way in WAYS[: 2 if precision == "bf16" else 1]:
        checkpoint.weights.clear()  # else they are held in float32 beside the network
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.to(way.dtype)
        engine.denoiser = TorchLoopDenoiser(model, way)
        played = Session(engine, join=False).replay(
            inputs["noise"], inputs["context"], plan=FixedPlan(1, 1)
        )
        results[way.name.replace(" ", "-")] = played.latents
    save_file(results, folder / f"torch-{precision}.safetensors")


def stage(name: str, command: Sequence[str]) -> dict[str, Any]:
    """Run a command; its duration, and the peak of its resident memory (at least this process's own).

    Raises:
        EngineError: it failed; what it says is on stderr.
    """
    began = perf_counter()
    pid = os.posix_spawn(
        sys.executable, [sys.executable, *command], dict(os.environ),
        file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)],  # stdout is for the report
    )  # fmt: skip
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise EngineError(f"{name} failed: python {' '.join(command)}")
    return {
        "stage": name,
        "seconds": perf_counter() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "command": f"python {' '.join(command)}",
    }


def stages(args: argparse.Namespace, work: Path) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is run, in order; what is there already is left out."""
    own = ["-m", "benchmarks.real_size", "--out", str(args.out), "--layers", str(args.layers)]
    build = ["-m", "export.build", "--checkpoint", str(work / "checkpoint"), "--out", str(work)]
    commands: list[tuple[str, list[str]]] = []
    if not (work / "checkpoint").exists():
        commands.append(("checkpoint", [*own, "--stage", "checkpoint"]))
    for precision in args.only:
        if precision in PLANS:
            size, kind = f"{LATENT_HW[0]}x{LATENT_HW[1]}", PLANS[precision]
            words = ["--target", "tensorrt", "--precision", kind, "--gpu", "sm89"]
            words += ["--latent-size", size, "--window-frames", "6"]
            commands.append((f"build {kind} plan", [*build, *words]))
            continue
        inputs, result = work / f"inputs-{precision}.safetensors", f"replay-{precision}.safetensors"
        write_inputs(inputs, RUNS[precision])
        engine = work / f"asd_{precision}.onnx"
        commands += [
            (f"build {precision}", [*build, "--target", "onnx", "--precision", precision]),
            (f"replay {precision}",
             ["-m", "asd_rt", "replay", "--engine", str(engine), "--inputs", str(inputs), "--out",
              str(work / result), "--steps-per-block", "1", "--no-dump-cache"]),
            (f"torch {precision}", [*own, "--stage", precision]),
        ]  # fmt: skip
    return [(name, lambda n=name, c=command: stage(n, c)) for name, command in commands]  # type: ignore[misc]


def compare(work: Path, precision: str, config: ModelConfig) -> dict[str, Any]:
    """Errors of the engine and of eager torch against eager float32 torch, and what was planned."""
    ours = load_file(work / f"replay-{precision}.safetensors")["latents"]
    theirs = load_file(work / f"torch-{precision}.safetensors")
    exact = theirs["eager-fp32"].astype(np.float64)

    def error(found: np.ndarray) -> float:
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    plan = plan_memory(Video(config, CacheConfig(FRAMES), precision, RUNS[precision], FRAMES))
    return {
        "precision": precision,
        "latent_hw": list(RUNS[precision]),
        "error": error(ours),
        "error_of_torch_bf16": error(theirs["eager-bf16"]) if "eager-bf16" in theirs else None,
        "planned_bytes": plan.total,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [f"# Real size: {report['layers']} layers of the 1.3B shape", ""]
    lines += ["| stage | s | of CPU time | peak memory, GB |", "|---|---:|---:|---:|"]
    for row in report["stages"]:
        figures = (row["seconds"], row["cpu_seconds"], row["peak_bytes"] / 1e9)
        lines.append("| {} | {:.0f} | {:.0f} | {:.2f} |".format(row["stage"], *figures))
    lines += ["", "| engine | latents | error | eager bf16 | planned, GB | measured, GB |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    peaks = {row["stage"]: row["peak_bytes"] / 1e9 for row in report["stages"]}
    for row in report["results"]:
        eager, (h, w) = row["error_of_torch_bf16"], row["latent_hw"]
        lines.append(
            f"| {row['precision']} | {h}x{w} | {row['error']:.1e} | "
            f"{'' if eager is None else f'{eager:.1e}'} | {row['planned_bytes'] / 1e9:.2f} | "
            f"{peaks['replay ' + row['precision']]:.2f} |"
        )
    machine = report["machine"]
    lines += [
        "",
        "Error: relative L2 distance of a block's latents, one step, from eager float32 PyTorch.",
        "",
        f"- machine: {machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}",
        f"- command: `{report['command']}`",
        *(f"- {row['stage']}: `{row['command']}`" for row in report["stages"]),
        "",
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """All stages, one after another; the report."""
    make_folder(args.out)
    work = args.out / "real-size"
    work.mkdir(exist_ok=True)
    todo = stages(args, work)
    done = []
    with Progress("stages", len(todo)) as progress:
        for name, act in todo:
            done.append(act())
            progress.advance(name)
    kept = [precision for precision in args.only if precision not in PLANS]
    config = ModelConfig(**{**WAN.to_json(), "num_layers": args.layers, "patch_size": (1, 2, 2)})
    return {
        "format_version": 1,
        "layers": args.layers,
        "stages": done,
        "results": [compare(work, precision, config) for precision in kept],
        "machine": timing.describe_machine(),
        "versions": timing.versions(),
        "command": command,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size",
        description="A random network of the 1.3B shape: built, played for one block, compared with PyTorch.",
        epilog="example: python -m benchmarks.real_size --out out --only bf16",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder, made if absent")
    parser.add_argument("--layers", type=int, default=WAN.num_layers, help="of 30 (default)")
    parser.add_argument(
        "--only", default="bf16,fp32,plan", help="of bf16, fp32, plan, int8plan; by commas"
    )
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    command = "python -m benchmarks.real_size " + " ".join(sys.argv[1:] if argv is None else argv)
    try:
        args.only = args.only.split(",")
        known = (*RUNS, *PLANS)
        unknown = [name for name in args.only if name not in known]
        if unknown:
            raise AsdError(f"--only {','.join(unknown)}: choose of {', '.join(known)}")
        if args.stage == "checkpoint":
            write_checkpoint(args.out / "real-size" / "checkpoint", args.layers)
            return 0
        if args.stage:
            run_torch(args.out / "real-size", args.stage)
            return 0
        report = run(args, command)
        for suffix, text in (
            ("json", json.dumps(report, indent=1) + "\n"),
            ("md", markdown(report)),
        ):
            with replacing(args.out / f"real-size.{suffix}") as temporary:
                temporary.write_text(text)
        print(markdown(report))
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
