"""How fast one engine streams, block by block: latency.json, latency.md and latency.png.

python -m benchmarks.latency --engine engines/asd_fp32.onnx --out out
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asd_rt
from asd_rt.bench import measure
from asd_rt.errors import AsdError
from asd_rt.files import make_folder, replacing
from asd_rt.progress import Progress
from asd_rt.session import Session
from asd_rt.timing import markdown_table

FORMAT_VERSION = 1
DEFAULT_BLOCKS = 16
DEFAULT_REPEATS = 20
DEFAULT_WARMUP = 2


def make_report(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """Measure `session`; everything that a reader needs to judge and repeat the figures."""
    total = args.blocks * (args.warmup + args.repeats)
    with Progress("blocks", total) as progress:
        measured = measure(
            session,
            blocks=args.blocks,
            steps=args.steps,
            first_steps=args.first_steps,
            warmup=args.warmup,
            repeats=args.repeats,
            on_block=progress.advance,
        )
    head = {
        "format_version": FORMAT_VERSION,
        "name": session.manifest.name,
        "fps": session.manifest.fps,
        "command": f"python -m benchmarks.latency --engine {measured['engine']} "
        f"--blocks {args.blocks} --steps {args.steps} --first-steps {args.first_steps} "
        f"--warmup {args.warmup} --repeats {args.repeats}",
    }
    return {**head, **measured}


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    machine, plan = report["machine"], report["plan"]
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(
        [
            f"# Latency of {report['name']}",
            "",
            f"{plan['first_steps']} steps for the first block, {plan['steps']} for later ones; "
            f"{report['repeats']} videos of {report['blocks']} blocks of {report['block_frames']} latent "
            f"frames, after {report['warmup']} to warm up. The engine is {report['precision']} on "
            f"{report['device']}; its video plays at {report['fps']} frames a second.",
            "",
            markdown_table(report["summary"]),
            f"- engine: {report['engine']}, sha256 {report['sha256']}",
            f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, load "
            f"{machine['load_average'][0]}",
            f"- versions: {packages}",
            f"- command: `{report['command']}`",
            "",
            "Later blocks are all but the first and the last, which writes no cache. Jitter is the "
            "standard deviation. Time to first frame is the first block's denoising and decoding: its "
            "frames leave before its cache pass runs.",
            "",
        ]
    )


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write latency.json, latency.md and latency.png into `folder`; returns their paths.

    Raises:
        OutputError: one cannot be written.
    """
    from benchmarks.latency_plot import save_plot

    paths = [folder / f"latency.{suffix}" for suffix in ("json", "md", "png")]
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
        prog="python -m benchmarks.latency",
        description="Measure how fast one engine streams: JSON, a table and a plot.",
    )
    result.add_argument("--engine", type=Path, help="engine file (default: the best one here)")
    result.add_argument("--out", type=Path, default=Path("out"), help="folder, made if absent")
    result.add_argument("--blocks", type=count, default=DEFAULT_BLOCKS, help="blocks of a video")
    result.add_argument("--steps", type=int, default=1)
    result.add_argument("--first-steps", type=int, default=4)
    result.add_argument(
        "--warmup", type=count, default=DEFAULT_WARMUP, help="videos before measuring"
    )
    result.add_argument("--repeats", type=count, default=DEFAULT_REPEATS, help="videos measured")
    return result


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, found {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        make_folder(args.out)
        with asd_rt.open(args.engine) as session:
            report = make_report(session, args)
        paths = write_report(report, args.out)
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown_table(report["summary"]))
    print(", ".join(str(path) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
