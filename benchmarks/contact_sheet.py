"""A contact sheet: one row a prompt, columns through time, streamed by an engine.

python -m benchmarks.contact_sheet --engine engines/asd_fp32.onnx --out out/contact_sheet.png
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import asd_rt
from asd_rt.errors import AsdError
from asd_rt.files import check_writable, replacing
from asd_rt.progress import Progress
from asd_rt.session import Session
from benchmarks.latency import count

PROMPTS = (
    "a red three moving up and left",
    "a yellow seven moving right",
    "a green two moving down",
    "a cyan five moving down and right",
    "a blue eight moving left",
    "a pink zero moving up",
    "a white four moving up and right",
    "a red nine moving down and left",
)
PAGE, INK, SOFT_INK = (255, 255, 255), (28, 30, 36), (128, 132, 142)
CELL = 120  # pixels of a frame's longer side, at least
GUTTER = 12
MARGIN = 28

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Row:
    """One video on the sheet: its prompt and its frames, uint8 [F, H, W, 3]."""

    label: str
    frames: Pixels


def spread_over(frames: int, columns: int) -> list[int]:
    """`columns` frame indices from the first frame to the last, evenly apart."""
    return [round(i) for i in np.linspace(0, frames - 1, min(columns, frames))]


def draw_sheet(rows: Sequence[Row], columns: int, fps: float, note: str = "") -> Image.Image:
    """Draw `rows`, all of one size and length.

    Pixels are enlarged to whole squares, and frames stand apart so that the edge of each picture shows.

    Args:
        rows: the videos.
        columns: frames shown of each.
        fps: frames a second, for the times above the columns.
        note: a line under the sheet.
    """
    count, height, width, _ = rows[0].frames.shape
    scale = max(1, -(-CELL // max(height, width)))
    cell_height, cell_width = height * scale, width * scale
    picked = spread_over(count, columns)
    font, small = ImageFont.load_default(17), ImageFont.load_default(13)
    lines = [_wrap(row.label) for row in rows]
    label_width = max(int(font.getlength(line)) for label in lines for line in label) + 20
    left, top = MARGIN + label_width, MARGIN + 26
    size = (
        left + len(picked) * (cell_width + GUTTER) - GUTTER + MARGIN,
        top + len(rows) * (cell_height + GUTTER) - GUTTER + MARGIN + (24 if note else 0),
    )
    sheet = Image.new("RGB", size, PAGE)
    draw = ImageDraw.Draw(sheet)
    for column, index in enumerate(picked):
        x = left + column * (cell_width + GUTTER)
        draw.text((x, top - 8), f"{index / fps:.2f} s", SOFT_INK, small, anchor="ls")
    for line, row in enumerate(rows):
        y = top + line * (cell_height + GUTTER)
        text = "\n".join(lines[line])
        draw.multiline_text((MARGIN, y + cell_height // 2), text, INK, font, anchor="lm", spacing=6)
        for column, index in enumerate(picked):
            frame = Image.fromarray(np.ascontiguousarray(row.frames[index]))
            frame = frame.resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(frame, (left + column * (cell_width + GUTTER), y))
    if note:
        draw.text((left, size[1] - MARGIN + 6), note, SOFT_INK, small, anchor="ls")
    return sheet


def _wrap(label: str, longest: int = 18) -> list[str]:
    """`label` in lines of about `longest` letters, broken between words."""
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > longest:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def stream(session: Session, prompts: Iterable[str], args: argparse.Namespace) -> list[Row]:
    """One video a prompt, all with the same plan and different seeds."""
    rows = []
    prompts = list(prompts)
    with Progress("videos", len(prompts)) as progress:
        for index, prompt in enumerate(prompts):
            blocks = session.generate(
                prompt,
                seed=args.seed + index,
                frames=args.frames,
                steps=args.steps,
                first_steps=args.first_steps,
            )
            frames = np.concatenate([b.frames for b in blocks if b.frames is not None])
            rows.append(Row(prompt, frames[: args.frames]))
            progress.advance(prompt)
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.contact_sheet",
        description="Draw a contact sheet of several prompts, streamed by an engine.",
    )
    result.add_argument("--engine", type=Path, help="engine file (default: the best one here)")
    result.add_argument("--out", type=Path, default=Path("out/contact_sheet.png"))
    result.add_argument("--frames", type=count, default=48)
    result.add_argument("--columns", type=int, default=9, help="frames shown of each video")
    result.add_argument("--steps", type=int, default=1)
    result.add_argument("--first-steps", type=int, default=4)
    result.add_argument(
        "--seed", type=int, default=0, help="of the first row; one more in each further row"
    )
    result.add_argument("--prompt", action="append", help="may be given several times")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parser()
    args = options.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if args.columns < 1:
        options.error(f"argument --columns: must be >= 1, found {args.columns}")
    try:
        check_writable(args.out, "--out")
        with asd_rt.open(args.engine) as session:
            rows = stream(session, args.prompt or PROMPTS, args)
            manifest = session.manifest
        plan = f"{args.first_steps} steps for the first block, {args.steps} for later ones"
        sheet = draw_sheet(rows, args.columns, manifest.fps, f"{manifest.name}, {plan}")
        with replacing(args.out) as temporary:
            sheet.save(temporary, format="PNG")
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
