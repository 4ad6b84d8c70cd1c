"""How time and memory grow: scaling-AXIS.json, .md and .png.

python -m benchmarks.scaling --axis blocks --out out                     # 2,000 blocks of one video
python -m benchmarks.scaling --axis threads,batch,window,resolution --out out

Blocks, threads and batch are those of a given engine; window and resolution need engines of their own, which
are built from a small network with random weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

import asd_rt
from asd_rt import timing
from asd_rt.errors import AsdError
from asd_rt.files import make_folder, replacing
from asd_rt.machine import usable_cores
from asd_rt.plan import FixedPlan
from asd_rt.progress import Progress
from asd_rt.session import Session
from benchmarks.latency_plot import GRID, INK, SOFT_INK
from benchmarks.sizes import random_checkpoint
from export.engine import Target, build_engine
from export.settings import Overrides, resolve

AXES = ("blocks", "threads", "batch", "window", "resolution")
SHORT_BLOCKS = 24
YOUNG_BLOCKS = 24  # of a short video, after its window is full
PARTS = 20  # of a long video
WINDOWS = (6, 9, 12, 18, 24)
RESOLUTIONS = (8, 12, 16, 24)
BASE = "28m"  # of which window and resolution take two layers


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(session: Session, blocks: int, batch: int = 1) -> tuple[list[float], list[int]]:
    """ms of each block of one video, its predecessor's cache pass included, and memory behind each."""
    ms, resident = [], []
    for taken in stream(session, blocks, batch):
        ms.append(taken)
        resident.append(resident_bytes())
    return ms, resident


def stream(session: Session, blocks: int, batch: int = 1) -> Iterator[float]:
    """ms of each block of one video, its predecessor's cache pass included."""
    manifest = session.manifest
    shape = (batch, manifest.model.text_len, manifest.model.text_dim)
    context = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    before = None
    for block in session.generate_from(context, 0, blocks * manifest.cache.block_frames, 1, 1):
        yield block.denoise_ms + (0.0 if before is None else before.cache_ms or 0.0)
        before = block


def young(session: Session, full: int) -> Iterator[float]:
    """ms of the blocks right after the window is full, of one video after another."""
    while True:
        yield from itertools.islice(stream(session, full + YOUNG_BLOCKS), full, None)


def along_blocks(args: argparse.Namespace) -> dict[str, Any]:
    """One long video: is it as fast, and as small, at its end as once its window was full?

    The machine itself is not as fast at all times. So each block takes turns with one of other, short videos.
    """
    with asd_rt.open(args.engine) as session, asd_rt.open(args.engine) as other:
        cache = session.manifest.cache
        full = (cache.window_frames or 0) // cache.block_frames + 1
        rivals = young(other, full)
        old, new, resident = [], [], []
        with Progress("blocks", args.blocks) as progress:
            for ms in stream(session, args.blocks):
                old.append(ms)
                new.append(next(rivals))
                resident.append(resident_bytes())
                progress.advance()
        name, device = session.manifest.name, session.engine.device
    # Medians of twenty parts: a hiccup of the machine is no slope.
    parts = np.array_split(np.arange(full, args.blocks), PARTS)
    ratios = np.array([np.median(np.array(old)[p] / np.array(new)[p]) for p in parts])
    slope, start = np.polyfit(np.linspace(0, 1, PARTS), ratios, 1)
    spread = np.std(ratios - (start + slope * np.linspace(0, 1, PARTS)), ddof=2)
    return {
        "engine": name,
        "device": device,
        "rows": [
            {
                "at": int(part[-1]) + 1,
                "ms": float(np.median(np.array(old)[part])),
                "young_ms": float(np.median(np.array(new)[part])),
                "resident_mb": float(np.median(np.array(resident)[part])) / 1e6,
            }
            for part in parts
        ],
        "slope": float(slope / np.median(ratios)),
        "slope_error": float(spread * (12 / PARTS) ** 0.5),
        "growth_mb": (resident[-1] - resident[full]) / 1e6,
    }


def _row(at: Any, session: Session, batch: int = 1) -> dict[str, Any]:
    run(session, SHORT_BLOCKS, batch)
    ms, resident = run(session, SHORT_BLOCKS, batch)
    return {"at": at, "ms": float(np.median(ms[-8:-1])), "resident_mb": resident[-1] / 1e6}


def along_threads(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same engine on 1 .. usable cores."""
    for threads in range(1, usable_cores() + 1):
        with asd_rt.open(args.engine, threads=threads) as session:
            yield _row(threads, session)


def along_batch(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Several videos at once."""
    with asd_rt.open(args.engine) as session:
        for batch in (1, 2, 4):
            yield _row(batch, session, batch)


def _built(args: argparse.Namespace, name: str, window: int, size: int) -> Session:
    base = random_checkpoint(BASE)
    config = replace(base.config, num_layers=2)
    weights = {
        key: value
        for key, value in base.weights.items()
        if not (key.startswith("blocks.") and int(key.split(".")[1]) >= config.num_layers)
    }
    told = replace(base.deployment, window_frames=window, latent_hw=(size, size))
    checkpoint = replace(
        base, name=f"random-{name}", config=config, weights=weights, deployment=told
    )
    folder = args.out / f"engines-{name}"
    folder.mkdir(exist_ok=True)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 1))
    target = Target("onnx", args.precision)
    return asd_rt.open(build_engine(checkpoint, settings, target, folder, force=False))


def along_window(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Longer windows at 16x16 latents: attention grows, all else stays."""
    for window in WINDOWS:
        with _built(args, f"window-{window}", window, 16) as session:
            yield _row(window, session)


def along_resolution(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Larger latents at a window of 12 frames."""
    for size in RESOLUTIONS:
        with _built(args, f"latents-{size}", 12, size) as session:
            yield _row(size, session)


GENERATORS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "threads": along_threads,
    "batch": along_batch,
    "window": along_window,
    "resolution": along_resolution,
}
UNITS = {
    "blocks": "block",
    "threads": "threads",
    "batch": "videos at once",
    "window": "frames of the window",
    "resolution": "latent rows and columns",
}


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [f"# Scaling with {report['axis']}", ""]
    if report["axis"] == "blocks":
        lines += [
            f"{report['blocks']} blocks of {report['engine']} on {report['device']}, one step each; medians "
            "of twenty parts after the window is full.",
            "",
            "In turns with blocks of short videos, whose window has just become full (young).",
            "",
            f"Change of the time of a block against young ones over the run (straight line): "
            f"{report['slope']:+.2%} +- {report['slope_error']:.2%}. Memory: {report['growth_mb']:+.2f} MB.",
            "",
        ]
    columns = {"at": UNITS[report["axis"]], "ms": "ms a block", "young_ms": "young, ms"}
    columns = {key: columns[key] for key in columns if key in report["rows"][0]}
    lines += ["| " + " | ".join([*columns.values(), "resident, MB |"])]
    lines += ["|" + "---|" * (len(columns) + 1)]
    for row in report["rows"]:
        cells = [f"{row[key]:.2f}" if "ms" in key else str(row[key]) for key in columns]
        lines.append("| " + " | ".join([*cells, f"{row['resident_mb']:.1f} |"]))
    machine = report["machine"]
    lines += [
        "",
        f"- machine: {machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}",
        f"- command: `{report['command']}`",
        "",
    ]
    return "\n".join(lines)


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Time and memory against the axis."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), dpi=130, layout="constrained")
    at = [row["at"] for row in report["rows"]]
    for axis, key, label in zip(
        axes, ("ms", "resident_mb"), ("ms a block", "resident, MB"), strict=True
    ):
        axis.plot(at, [row[key] for row in report["rows"]], "o-", color="#2a5caa", markersize=4)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(UNITS[report["axis"]], color=SOFT_INK)
        axis.set_title(label, loc="left", color=INK, fontsize=10)
        axis.grid(color=GRID)
    figure.savefig(path, format="png")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Time and memory against blocks, threads, batch, window or resolution.",
        epilog="example: python -m benchmarks.scaling --axis blocks,threads --out out",
    )
    parser.add_argument("--axis", default="blocks", help=f"of {', '.join(AXES)}; several by commas")
    parser.add_argument("--engine", type=Path, help="engine file (default: the best one here)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder, made if absent")
    parser.add_argument("--blocks", type=int, default=2000, help="of the long video")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of built ones"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        asked = args.axis.split(",")
        unknown = [axis for axis in asked if axis not in AXES]
        if unknown:
            raise AsdError(f"--axis {','.join(unknown)}: choose of {', '.join(AXES)}")
        make_folder(args.out)
        with Progress("axes", len(asked)) as progress:
            for axis in asked:
                found = (
                    along_blocks(args)
                    if axis == "blocks"
                    else {"rows": list(GENERATORS[axis](args))}
                )
                report = {
                    "format_version": 1,
                    "axis": axis,
                    "blocks": args.blocks,
                    "machine": timing.describe_machine(),
                    "versions": timing.versions(),
                    "command": "python -m benchmarks.scaling "
                    + " ".join(sys.argv[1:] if argv is None else argv),
                    **found,
                }
                for suffix, write in (
                    ("json", lambda p, r=report: p.write_text(json.dumps(r, indent=1) + "\n")),
                    ("md", lambda p, r=report: p.write_text(markdown(r))),
                    ("png", lambda p, r=report: save_plot(r, p)),
                ):
                    with replacing(args.out / f"scaling-{axis}.{suffix}") as temporary:
                        write(temporary)
                print(markdown(report))
                progress.advance()
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
