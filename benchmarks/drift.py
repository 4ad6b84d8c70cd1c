"""Does an endless video stay what it was? drift.json, .md, .png and a contact sheet, drift-frames.png.

python -m benchmarks.drift --blocks 10000 --videos 1 --refresh 0 8 --out out

Videos of the tiny world, played by one stream in turns; every part of so many blocks is described by what the
judge sees, by brightness, saturation and latents, and by time and memory. The judge is trained when it is
first needed. Times mean something on an idle machine only; the rest does not depend on it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import asd_rt
from asd_rt import timing
from asd_rt.errors import ConfigError
from asd_rt.files import make_folder
from asd_rt.progress import Progress
from asd_rt.session import Session
from benchmarks.contact_sheet import Row, draw_sheet
from benchmarks.judge import NAMES, shipped_judge
from benchmarks.latency_plot import GRID, INK, SOFT_INK
from benchmarks.scaling import resident_bytes
from benchmarks.tiny_report import contexts, make_parser, origin, run, to_pixels, write
from train.judge import Judge
from train.tiny_world import prompt_text, random_labels

BRIGHT = 0.35  # streaks have more pixels above it than digits have
JUDGED_EVERY = 4  # blocks; two of each are judged together
SHEET_COLUMNS = 12
COLOURS = ("#2a5caa", "#f0a63c", "#4c9a86", "#b3446c", "#80848e")
PLOTTED = (
    ("all", "digit, colour and axes right"),
    ("bright", f"share of pixels above {BRIGHT}"),
    ("saturation", "saturation"),
    ("latent_rms", "latents, root mean square"),
    ("ms", "ms a block of one video"),
    ("resident_mb", "resident, MB"),
)


def describe(judge: Judge, pairs: list[NDArray[np.float32]], labels: Tensor) -> dict[str, Any]:
    """What blocks show: `pairs` of [N, F, C, h, w], each two blocks of all N videos."""
    hits = np.stack([judge.hits(judge.frames(pair), labels, later=True) for pair in pairs])
    frames = torch.cat([judge.frames(pair[:, ::3]) for pair in pairs]).numpy()
    high, low = frames.max(axis=2), frames.min(axis=2)
    right = hits.all(axis=2)
    return {
        **{name: float(hits[..., i].mean()) for i, name in enumerate(NAMES)},
        "all": float(right.mean()),
        "all_by_video": right.mean(axis=0).round(4).tolist(),
        "brightness": float(frames.mean()),
        "bright": float((high > BRIGHT).mean()),
        "saturation": float(((high - low) / np.maximum(high, 1e-3))[high > BRIGHT].mean())
        if (high > BRIGHT).any()
        else 0.0,
        "latent_rms": float(np.sqrt(np.mean([np.square(pair).mean() for pair in pairs]))),
    }


def play(
    session: Session, judge: Judge, labels: Tensor, refresh_every: int, args: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], NDArray[np.float32]]]:
    """A row for every part of the videos, and the latents of the part's first frame."""
    stream = session.generate_from(
        contexts(session, labels),
        args.seed,
        0,
        args.steps,
        refresh_every=refresh_every,
    )
    ms: list[float] = []
    pairs: list[NDArray[np.float32]] = []
    before, first = None, None
    with Progress("blocks", args.blocks) as progress:
        for number, block in enumerate(stream, 1):
            cache_ms = 0.0 if before is None else before.cache_ms or 0.0
            ms.append((block.denoise_ms + cache_ms + (block.switch_ms or 0.0)) / len(labels))
            first = block.latents[:, :1] if first is None else first
            if before is not None and number % JUDGED_EVERY == 0:
                pairs.append(np.concatenate([before.latents, block.latents], axis=1))
            before = block
            progress.advance()
            if number % args.part == 0:
                times = {
                    "ms": float(np.median(ms)),
                    "p99_ms": float(np.percentile(ms, 99)),
                    "resident_mb": resident_bytes() / 1e6,
                }
                yield {"at": number, **describe(judge, pairs, labels), **times}, first
                ms, pairs, first = [], [], None
            if number >= args.blocks:
                stream.close()
                return


def measure(session: Session, judge: Judge, args: argparse.Namespace) -> dict[str, Any]:
    """All policies on the same prompts and noise; rows by policy, and frames for the sheet."""
    generator = torch.Generator().manual_seed(args.seed)
    labels = random_labels(args.videos, generator)
    policies, shown = {}, []
    for every in args.refresh:
        name = f"every {every}" if every else "never"
        parts = list(play(session, judge, labels, every, args))
        policies[name] = [row for row, _ in parts]
        picked = np.linspace(0, len(parts) - 1, min(SHEET_COLUMNS, len(parts))).round().astype(int)
        for i in range(min(3, args.videos)):
            latents = np.concatenate([parts[p][1][i : i + 1] for p in picked], axis=1)
            label = f"{prompt_text(*labels[i].tolist())}, {name}"
            shown.append(Row(label, to_pixels(judge.frames(latents)[0])))
    fps = session.manifest.fps / (args.part * session.manifest.cache.block_frames)
    return {"policies": policies, "sheet": draw_sheet(shown, SHEET_COLUMNS, fps)}


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader: the first part, the last, and the mean of all."""
    lines = [
        "# Drift",
        "",
        f"{report['videos']} videos of {report['blocks']} blocks, in parts of {report['part']}; right is "
        "what the judge sees of the prompt (digit, colour, axes of motion) in every second pair of blocks.",
        "",
        "| refreshed | part | all right | digit | colour | axes | bright | saturation | latents | ms | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in report["policies"].items():
        means = {
            key: float(np.mean([row[key] for row in rows]))
            for key, value in rows[0].items()
            if isinstance(value, float)
        }
        for part, row in (("first", rows[0]), ("last", rows[-1]), ("mean", means)):
            lines.append(
                f"| {name} | {part} | {row['all']:.3f} | {row['digit']:.3f} | {row['colour']:.3f} | "
                f"{row['axes']:.3f} | {row['bright']:.4f} | {row['saturation']:.3f} | "
                f"{row['latent_rms']:.3f} | {row['ms']:.2f} | {row['resident_mb']:.1f} |"
            )
    machine = report["machine"]
    lines += [
        "",
        f"- engine: {report['engine']}",
        f"- machine: {machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}",
        f"- command: `{report['command']}`",
        "",
    ]
    return "\n".join(lines)


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Every figure against the blocks played, a line for each policy."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.4), dpi=130, layout="constrained")
    for axis, (key, label) in zip(axes.flat, PLOTTED, strict=True):
        for colour, (name, rows) in zip(COLOURS * 9, report["policies"].items(), strict=False):
            at = [row["at"] for row in rows]
            axis.plot(at, [row[key] for row in rows], color=colour, label=name, linewidth=1.4)
        axis.set_ylim(0, 1.08 * max(axis.get_ylim()[1], 1e-9))  # flat lines stay below the frame
        axis.set_xlabel("block", color=SOFT_INK)
        axis.set_title(label, loc="left", color=INK, fontsize=10)
        axis.grid(color=GRID)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, format="png")
    plt.close(figure)


def report(args: argparse.Namespace, command: str) -> None:
    """Measure and write.

    Raises:
        AsdError: anything the user can mend.
    """
    if not args.videos >= 1 or not JUDGED_EVERY <= args.part <= args.blocks:
        raise ConfigError(
            f"--videos must be at least 1 and --part from {JUDGED_EVERY} to --blocks, found "
            f"{args.videos} and {args.part}"
        )
    make_folder(args.out)
    judge = shipped_judge()
    with asd_rt.open(args.engine) as session:
        found = measure(session, judge, args)
        told = origin(session, args, "videos", "blocks", "part", "seed")
    told |= {
        "policies": found["policies"],
        "machine": timing.describe_machine(),
        "command": command,
    }
    save = {
        "drift.png": lambda path: save_plot(told, path),
        "drift-frames.png": lambda path: found["sheet"].save(path, format="png"),
    }
    write(args.out, "drift", told, markdown(told), save)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = make_parser(
        "drift",
        "What long videos of the tiny world show, and what they take, part by part.",
        "--blocks 2000 --refresh 0 8 --out out",
    )
    parser.add_argument("--blocks", type=int, default=2000)
    parser.add_argument("--part", type=int, default=100, help="blocks that one row describes")
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--steps", type=int, help="of later blocks (default: the engine's)")
    parser.add_argument(
        "--refresh",
        nargs="+",
        type=int,
        default=[0, 8],
        help="blocks between refreshes, 0 = never; each is played",
    )
    return run(parser, report, argv)


if __name__ == "__main__":
    sys.exit(main())
