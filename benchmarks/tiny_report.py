"""What the reports on videos of the tiny world share: flags, where figures are from, and files."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from asd_rt import timing
from asd_rt.errors import AsdError
from asd_rt.files import replacing
from asd_rt.session import Session
from train.tiny_world import prompt_text


def make_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """The command line of `python -m benchmarks.NAME`, with the flags that all reports have."""
    command = f"python -m benchmarks.{name}"
    parser = argparse.ArgumentParser(
        prog=command, description=description, epilog=f"example: {command} {example}"
    )
    parser.add_argument("--engine", type=Path, help="of the tiny student (default: the best here)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder, made if absent")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run(
    parser: argparse.ArgumentParser,
    report: Callable[[argparse.Namespace, str], None],
    argv: Sequence[str] | None,
) -> int:
    """Make a report from `argv`, given the flags and the command in one line; returns the exit code."""
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        report(args, " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)]))
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def origin(session: Session, args: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """Where figures are from: the engine, and the values of `flags`."""
    return {
        "format_version": 1,
        "engine": session.manifest.name,
        "sha256": session.manifest.parts["denoiser"].sha256,
        "device": session.engine.device,
        "versions": timing.versions(),
        **{flag: getattr(args, flag) for flag in flags},
    }


def write(
    folder: Path,
    name: str,
    report: dict[str, Any],
    text: str,
    pictures: Mapping[str, Callable[[Path], None]],
) -> None:
    """Write NAME.json, NAME.md of `text`, and `pictures` by their files' names; print `text`."""
    for suffix, content in (("json", json.dumps(report, indent=1) + "\n"), ("md", text)):
        with replacing(folder / f"{name}.{suffix}") as temporary:
            temporary.write_text(content)
    for file, save in pictures.items():
        with replacing(folder / file) as temporary:
            save(temporary)
    print(text)


def contexts(session: Session, labels: Tensor) -> NDArray[np.float32]:
    """Embeddings of the prompts of `labels` [N, 3] (digit, colour, direction), one after the other."""
    return np.concatenate([session.context(prompt_text(*row)) for row in labels.tolist()])


def to_pixels(frames: Tensor) -> NDArray[np.uint8]:
    """Frames [F, 3, H, W] in 0..1 as pixels [F, H, W, 3]."""
    return (frames.movedim(1, -1).numpy() * 255).round().astype(np.uint8)
