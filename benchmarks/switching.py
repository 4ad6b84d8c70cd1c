"""How many blocks until a new prompt shows: switching.json, .md and .png.

python -m benchmarks.switching --out out           # 64 switches, with the cache kept and computed anew

On the tiny world, whose judge says what three frames show. It is trained when it is first needed, which
takes a minute or so. Accuracy only: what else runs on the machine does not matter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import asd_rt
from asd_rt.files import make_folder
from asd_rt.session import Session
from benchmarks.contact_sheet import Row, draw_sheet
from benchmarks.judge import NAMES, shipped_judge
from benchmarks.tiny_report import contexts, make_parser, origin, run, to_pixels, write
from train.judge import Judge, same_axes
from train.scores import bootstrap
from train.tiny_world import COLOURS, DIGITS, DIRECTIONS, random_labels

WAYS = {"kept": False, "recached": True}
NEW_VIDEO = "a new video"
SHARES_AFTER = (1, 2, 3, 4, 8, 12)  # blocks
SHEET_SWITCHES, SHEET_COLUMNS = 4, 12
RESAMPLED = 1000

Latents = NDArray[np.float32]
Hits = NDArray[np.bool_]


def draw_switches(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels before and behind `count` switches, int64 [count, 3]: digit, colour and axes all change."""
    generator = torch.Generator().manual_seed(seed)
    old, new = [], []
    while len(old) < count:
        one, other = random_labels(2, generator)
        turned = not same_axes(one[2:3], other[2:3]).item()
        if one[0] != other[0] and one[1] != other[1] and turned:
            old.append(one)
            new.append(other)
    return torch.stack(old), torch.stack(new)


def play(
    session: Session, old: Tensor, new: Tensor, at: int, after: int, recache: bool, seed: int
) -> Latents:
    """Latents [N, F, C, h, w] of all videos at once; their prompts change before block `at`."""
    frames = (at + after) * session.manifest.cache.block_frames
    stream = session.generate_from(contexts(session, old), seed, frames)
    blocks = []
    for block in stream:
        blocks.append(block.latents)
        if len(blocks) == at:
            stream.switch_prompt(contexts(session, new), recache)
    return np.concatenate(blocks, axis=1)


def hits_by_block(judge: Judge, latents: Latents, labels: Tensor, size: int) -> Hits:
    """What each block shows of `labels`: bool [N, blocks, 3]."""
    parts = np.split(latents, latents.shape[1] // size, axis=1)
    return np.stack([judge.hits(judge.frames(part), labels, later=True) for part in parts], axis=1)


def blocks_until(hits: Hits) -> NDArray[np.float64]:
    """Blocks until something shows, and does so in the next one as well: [N], from bool [N, blocks].

    1 = in the first block; infinite where it never does.
    """
    both = hits[:, :-1] & hits[:, 1:]
    return np.where(both.any(axis=1), both.argmax(axis=1) + 1.0, np.inf)


def figures(hits: Hits) -> dict[str, Any]:
    """Of bool [N, blocks]: how soon, and how surely; intervals are 95 % bootstrap ones."""
    until = blocks_until(hits)
    draws = np.random.default_rng(0).integers(0, len(until), (RESAMPLED, len(until)))
    low, high = np.percentile(np.median(until[draws], axis=1), [2.5, 97.5], method="nearest")
    shares = {n: bootstrap(until <= n) for n in SHARES_AFTER if n < hits.shape[1]}
    return {
        "median_blocks": _finite(np.median(until)),
        "median_low": _finite(low),
        "median_high": _finite(high),
        "never": int(np.isinf(until).sum()),
        "shown_within": {n: [s.value, s.low, s.high] for n, s in shares.items()},
        "right_by_block": hits.mean(axis=0).round(4).tolist(),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def measure(session: Session, judge: Judge, args: argparse.Namespace) -> dict[str, Any]:
    """All ways on the same switches and noise; the latents are under "latents"."""
    old, new = draw_switches(args.switches, args.seed)
    size = session.manifest.cache.block_frames
    latents = {
        way: play(session, old, new, args.at, args.after, recache, args.seed)
        for way, recache in WAYS.items()
    }
    latents[NEW_VIDEO] = play(session, new, new, args.at, args.after, False, args.seed)
    rows = {}
    for way, found in latents.items():
        seen = found if way == NEW_VIDEO else found[:, args.at * size :]
        hits = hits_by_block(judge, seen, new, size)[:, : args.after]
        kinds = {name: hits[:, :, i] for i, name in enumerate(NAMES)} | {"all": hits.all(axis=2)}
        rows[way] = {name: figures(kind) for name, kind in kinds.items()}
    return {"rows": rows, "latents": latents, "labels": (old, new)}


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    within = list(next(iter(report["rows"].values()))["all"]["shown_within"])
    lines = [
        "# Prompt switches",
        "",
        f"{report['switches']} switches before block {report['at']}, {report['after']} blocks watched; "
        "digit, colour and axes of motion all change. A prompt shows where the judge finds it in a block "
        "and in the next. Medians and shares with 95 % bootstrap intervals.",
        "",
        "| cache | shows | blocks, median | "
        + " | ".join(f"within {n}" for n in within)
        + " | never |",
        "|---|---|---|" + "---|" * (len(within) + 1),
    ]
    for way, kinds in report["rows"].items():
        for name, row in kinds.items():
            cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row["shown_within"][n]) for n in within]
            low, high = (_blocks(row[key]) for key in ("median_low", "median_high"))
            median = f"{_blocks(row['median_blocks'])} [{low}, {high}]"
            lines.append(
                f"| {way} | {name} | {median} | " + " | ".join(cells) + f" | {row['never']} |"
            )
    lines += ["", f"- engine: {report['engine']}", f"- command: `{report['command']}`", ""]
    return "\n".join(lines)


def _blocks(count: float | None) -> str:
    return "never" if count is None else f"{count:g}"


def sheet(judge: Judge, found: dict[str, Any], args: argparse.Namespace, session: Session) -> Any:
    """The first switches, a row for each way, from the last block before the switch on."""
    size = session.manifest.cache.block_frames
    begin = (args.at - 1) * size
    rows = []
    for i in range(min(SHEET_SWITCHES, args.switches)):
        names = [
            f"{list(COLOURS)[c]} {DIGITS[d]} {list(DIRECTIONS)[m]}"
            for d, c, m in (labels[i].tolist() for labels in found["labels"])
        ]
        for way in WAYS:
            latents = found["latents"][way][i : i + 1, begin : begin + SHEET_COLUMNS * size]
            pixels = to_pixels(judge.frames(latents)[0])
            rows.append(Row(f"{' to '.join(names)}, {way}", pixels))
    note = f"the prompt changes behind the first {size} frames"
    return draw_sheet(rows, SHEET_COLUMNS, session.manifest.fps, note)


def report(args: argparse.Namespace, command: str) -> None:
    """Measure and write.

    Raises:
        AsdError: anything the user can mend.
    """
    make_folder(args.out)
    judge = shipped_judge()
    with asd_rt.open(args.engine) as session:
        found = measure(session, judge, args)
        told = origin(session, args, "switches", "at", "after", "seed")
        picture = sheet(judge, found, args, session)
    told |= {"rows": found["rows"], "command": command}
    save = {"switching.png": lambda path: picture.save(path, format="png")}
    write(args.out, "switching", told, markdown(told), save)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = make_parser(
        "switching",
        "Blocks until a new prompt shows, with the cache kept and computed anew.",
        "--switches 64 --out out",
    )
    parser.add_argument("--switches", type=int, default=64)
    parser.add_argument("--at", type=int, default=4, help="block before which prompts change")
    parser.add_argument("--after", type=int, default=13, help="blocks watched")
    return run(parser, report, argv)


if __name__ == "__main__":
    sys.exit(main())
