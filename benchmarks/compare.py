"""Ours against PyTorch on the same weights, noise and plan: compare.json, compare.md and compare.png.

python -m benchmarks.compare --out out
python -m benchmarks.compare --size 113m --passes --out out

All ways take turns in one run, so that whatever else the machine does hits them alike. Speed is that of whole
videos, decoded to frames where the engine can, or of single passes behind a full window; accuracy is the
distance of the result from that of eager float32.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import asd_rt
from asd_rt import timing
from asd_rt.errors import AsdError
from asd_rt.files import make_folder, replacing
from asd_rt.machine import bf16_instructions, usable_cores
from asd_rt.noise import gaussian
from asd_rt.plan import FixedPlan
from asd_rt.progress import Progress
from asd_rt.session import Session
from benchmarks.compare_plot import save_plot
from benchmarks.latency import count
from benchmarks.sizes import SIZES, random_checkpoint
from benchmarks.torch_loop import WAYS, torch_engine
from export.build import default_checkpoint
from export.engine import Target, build_engine
from export.metrics import relative_l2
from export.settings import Overrides, resolve
from train.checkpoint import Checkpoint, load_checkpoint

FORMAT_VERSION = 1
REFERENCE = "eager fp32"
PROMPT_SEED = 1
_log = logging.getLogger(__name__)
PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Contender:
    """One way to make the video: its name, and a session to make it with."""

    name: str
    session: Session


def run_pass(session: Session, context: Any, args: argparse.Namespace) -> tuple[list[float], Any]:
    """One pass behind a full window of zeros, as `play` gives it."""
    manifest, denoiser = session.manifest, session.engine.denoiser
    size = manifest.cache.block_frames
    past = (manifest.cache.window_frames or args.blocks * size) - size
    shape = (1, size, manifest.model.in_dim, *(manifest.latent_hw or (0, 0)))
    if not args.prepared.get(id(session)):
        denoiser.prepare(1, shape[3:], past + 2 * size)
        denoiser.set_prompt(context)
        args.prepared[id(session)] = True
    x = gaussian(shape, 0, 0, 0)
    begin = perf_counter()
    flow = denoiser.denoise(x, 1000.0, range(past, past + size), past)
    ms = 1e3 * (perf_counter() - begin)
    return [ms, ms, ms], flow.copy()


def play(session: Session, context: Any, args: argparse.Namespace) -> tuple[list[float], Any]:
    """One video: (ms in all, until the first frame and of the last pass; its latents)."""
    frames = args.blocks * session.manifest.cache.block_frames
    begin = perf_counter()
    first, blocks = 0.0, []
    for block in session.generate_from(context, 0, frames, args.steps, args.first_steps):
        first = first or perf_counter() - begin
        blocks.append(block)
    total = perf_counter() - begin
    latents = np.concatenate([block.latents for block in blocks], axis=1)
    return [1e3 * total, 1e3 * first, blocks[-1].pass_ms[-1]], latents


def compare(
    contenders: Sequence[Contender],
    context: Any,
    args: argparse.Namespace,
    tick: Callable[[], None],
) -> list[dict[str, Any]]:
    """Rounds in which every contender makes the video once; one row each, the reference first."""
    one = run_pass if args.passes else play
    latents = {}
    for contender in contenders:
        for _ in range(args.warmup):
            latents[contender.name] = one(contender.session, context, args)[1]
            tick()
    taken: dict[str, list[list[float]]] = {c.name: [] for c in contenders}
    for turn in range(args.rounds):
        # Nobody always follows the same neighbour.
        for i in np.random.default_rng(turn).permutation(len(contenders)):
            # The one before leaves its data in the caches and its threads awake: once to settle.
            one(contenders[i].session, context, args)
            ms, _ = one(contenders[i].session, context, args)
            taken[contenders[i].name].append(ms)
            tick()
    rows = []
    for contender in contenders:
        figures = np.array(taken[contender.name])
        low, middle, high = np.percentile(figures[:, 0], [25, 50, 75])
        rows.append(
            {
                "name": contender.name,
                "device": contender.session.engine.device,
                "video_ms": {"p25": low, "p50": middle, "p75": high},
                "first_frame_ms": float(np.median(figures[:, 1])),
                "last_pass_ms": float(np.median(figures[:, 2])),
                "error": relative_l2(latents[contender.name], latents[REFERENCE]),
                "all_video_ms": figures[:, 0].tolist(),
                "all_pass_ms": figures[:, 2].tolist(),
            }
        )
    return rows


def ratios(rows: Sequence[dict[str, Any]], name: str, figure: str) -> dict[str, dict[str, float]]:
    """How many times as long each other way takes as `name`: quartiles over the rounds, which are pairs."""
    own = np.array(next(row[figure] for row in rows if row["name"] == name))
    found = {}
    for row in rows:
        if row["name"] != name:
            low, middle, high = np.percentile(np.array(row[figure]) / own, [25, 50, 75])
            found[row["name"]] = {"p25": float(low), "p50": float(middle), "p75": float(high)}
    return found


def _gain(ratio: dict[str, float] | None) -> str:
    return f"{ratio['p50']:.2f}x ({ratio['p25']:.2f} to {ratio['p75']:.2f})" if ratio else "(ours)"


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    machine, plan = report["machine"], report["plan"]
    what = (
        "One pass behind a full window"
        if report["passes"]
        else f"One video of {report['blocks']} blocks, {plan['first_steps']} steps for the first and "
        f"{plan['steps']} for later ones, decoded"
    )
    lines = [
        f"# {report['name']} against PyTorch",
        "",
        f"{what}; all ways in turns, {report['rounds']} rounds. Error is the relative L2 distance of the "
        f"result from that of {REFERENCE}.",
        "",
        "| way | video, ms (quartiles) | first frame, ms | last pass, ms | error | ours is faster by the "
        "video (quartiles) | by the pass |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ms = row["video_ms"]
        gains = [_gain(report[kind].get(row["name"])) for kind in ("ratios", "pass_ratios")]
        lines.append(
            f"| {row['name']} | {ms['p50']:.1f} ({ms['p25']:.1f} to {ms['p75']:.1f}) | "
            f"{row['first_frame_ms']:.1f} | {row['last_pass_ms']:.2f} | {row['error']:.1e} | "
            f"{gains[0]} | {gains[1]} |"
        )
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        "",
        f"- weights: {report['checkpoint']}; by the video ours is {report['ours']}, by the pass "
        f"{report['ours_by_pass']}",
        f"- machine: {machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}",
        f"- versions: {packages}",
        f"- command: `{report['command']}`",
        "",
    ]
    return "\n".join(lines)


def _engines(args: argparse.Namespace) -> tuple[Checkpoint, list[Path | None]]:
    """The checkpoint, and engine files of it: those asked for, or built for a size."""
    if args.size is None:
        engines: list[Path | None] = list(args.engine or [None])
        return load_checkpoint(args.checkpoint or default_checkpoint()), engines
    checkpoint = random_checkpoint(args.size)
    settings = resolve(checkpoint, Overrides(), FixedPlan(args.steps, args.first_steps))
    folder = args.out / f"engines-{args.size}"
    folder.mkdir(exist_ok=True)
    targets = [Target("onnx", precision) for precision in args.precision]
    return checkpoint, [
        build_engine(checkpoint, settings, target, folder, force=False) for target in targets
    ]


def make_report(args: argparse.Namespace) -> dict[str, Any]:
    """Open everything, measure, and say what was measured."""
    import torch

    checkpoint, files = _engines(args)
    with ExitStack() as stack:
        contenders: list[Contender] = []
        for file in files:
            ours = stack.enter_context(asd_rt.open(file))
            manifest = ours.manifest
            if manifest.checkpoint["sha256"] != checkpoint.sha256:
                raise AsdError(
                    f"{ours.engine.path}: was built from checkpoint {manifest.checkpoint['name']} with other "
                    f"weights than {checkpoint.name}; name its own with --checkpoint"
                )
            name = f"asd-rt {manifest.precision}"
            contenders.append(Contender(name, Session(ours.engine, join=False)))
            if ours.engine.denoiser.can_join and not args.passes:
                contenders.append(Contender(f"{name}, joined", Session(ours.engine, join=True)))
        torch.set_num_threads(args.threads or usable_cores())
        # Without instructions for it, a large network in bfloat16 takes PyTorch minutes a pass.
        slow_bf16 = bool(args.size) and not bf16_instructions()
        if slow_bf16:
            _log.warning(
                "PyTorch in bfloat16 is left out: this processor has no instructions for it"
            )
        for way in reversed(WAYS):
            if slow_bf16 and way.dtype == torch.bfloat16:
                continue
            if not (args.no_compile and way.compiled):
                rival = torch_engine(checkpoint, manifest, way)
                contenders.insert(0, Contender(way.name, Session(rival)))
        size = (1, manifest.model.text_len, manifest.model.text_dim)
        context = np.random.default_rng(PROMPT_SEED).standard_normal(size).astype(np.float32)
        total = len(contenders) * (args.warmup + args.rounds)
        with Progress("videos", total) as progress:
            rows = compare(contenders, context, args, progress.advance)
    ours_rows = [row for row in rows if row["name"].startswith("asd-rt")]
    best = min(ours_rows, key=lambda row: row["video_ms"]["p50"])["name"]
    # By the pass, separate passes count: a joined one does the work of two.
    apart = [row for row in ours_rows if not row["name"].endswith("joined")]
    best_pass = min(apart, key=lambda row: row["last_pass_ms"])["name"]
    return {
        "format_version": FORMAT_VERSION,
        "name": args.size or manifest.name,
        "checkpoint": checkpoint.name,
        "window_frames": manifest.cache.window_frames,
        "machine": timing.describe_machine(),
        "versions": timing.versions() | {"torch": torch.__version__},
        "command": "python -m benchmarks.compare " + " ".join(args.given),
        "plan": {"steps": args.steps, "first_steps": args.first_steps},
        "passes": args.passes,
        "blocks": args.blocks,
        "rounds": args.rounds,
        "rows": rows,
        "ours": best,
        "ratios": ratios(rows, best, "all_video_ms"),
        "ours_by_pass": best_pass,
        "pass_ratios": ratios(rows, best_pass, "all_pass_ms"),
    }


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write compare-NAME.json, .md and .png into `folder`; returns their paths."""
    paths = [folder / f"compare-{report['name']}.{suffix}" for suffix in ("json", "md", "png")]
    with replacing(paths[0]) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with replacing(paths[1]) as temporary:
        temporary.write_text(markdown(report))
    with replacing(paths[2]) as temporary:
        save_plot(report, temporary)
    return paths


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="The same video with an engine and with PyTorch, in turns: JSON, a table and a plot.",
        epilog="example: python -m benchmarks.compare --engine engines/asd_fp32.onnx --out out",
    )
    result.add_argument(
        "--engine", type=Path, nargs="+", help="engine files (default: the best one here)"
    )
    result.add_argument("--size", choices=tuple(SIZES), help="instead: random weights of this size")
    result.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="of the engines of --size (default: all)",
    )
    result.add_argument("--threads", type=int, help="of PyTorch (default: as ours, usable cores)")
    result.add_argument(
        "--checkpoint", type=Path, help="its weights (default: the shipped student)"
    )
    result.add_argument("--out", type=Path, default=Path("out"), help="folder, made if absent")
    result.add_argument("--blocks", type=count, default=7, help="blocks of the video")
    result.add_argument("--steps", type=int, default=1)
    result.add_argument("--first-steps", type=int, default=4)
    result.add_argument(
        "--warmup", type=count, default=2, help="videos of each way before measuring"
    )
    result.add_argument("--rounds", type=count, default=30, help="measured videos of each way")
    result.add_argument(
        "--passes", action="store_true", help="single passes behind a full window, not videos"
    )
    result.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    args.prepared = {}
    args.given = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        make_folder(args.out)
        report = make_report(args)
        paths = write_report(report, args.out)
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown(report))
    print(", ".join(str(path) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
