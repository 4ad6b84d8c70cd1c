"""Does a deadline plan keep its promise when another program takes a core? hog.json, hog.md and hog.png.

python -m benchmarks.hog --out out                    # twice what a block of all steps takes here
python -m benchmarks.hog --deadline-ms 20 --out out

A minute of video is streamed and taken at the pace of the deadline, as a player would. In its middle a busy
loop is bound to one core. Wanted: hardly a miss outside that time, fewer steps instead of fewer frames within
it, and full quality again soon after.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

import asd_rt
from asd_rt import timing
from asd_rt.deadline import check_deadline
from asd_rt.errors import AsdError
from asd_rt.files import make_folder, replacing
from asd_rt.machine import affinity_cpus
from asd_rt.progress import Progress
from asd_rt.schedule import MAX_STEPS
from asd_rt.session import Session
from benchmarks.latency_plot import GRID, INK, SOFT_INK

RECOVERY_BLOCKS = 5  # that the plan may take after the hog
SPARE = 2.0  # default deadline: this many times what a block of all steps takes
MEASURED_BLOCKS = 60


def burn(cpu: int, seconds: float) -> None:
    """Keep one core busy."""
    os.sched_setaffinity(0, {cpu})
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


def any_prompt(session: Session) -> str:
    """A word that the engine knows."""
    return next(w for w, t in (session.manifest.tokenizer or {})["words"].items() if t)


def spare_deadline_ms(session: Session) -> float:
    """A deadline with SPARE times the room that a block of all steps takes behind a full window."""
    frames = MEASURED_BLOCKS * session.manifest.cache.block_frames
    taken, last = [], perf_counter()
    for _ in session.generate(any_prompt(session), frames=frames, steps=MAX_STEPS):
        now = perf_counter()
        taken.append(1e3 * (now - last))
        last = now
    return round(SPARE * float(np.median(taken[MEASURED_BLOCKS // 2 :])))


def stream(session: Session, args: argparse.Namespace, deadline_ms: float) -> list[dict[str, Any]]:
    """One row a block: when it was there, its steps, what it took, and whether the hog was about."""
    period = deadline_ms / 1e3
    blocks = int(args.seconds / period)
    frames = blocks * session.manifest.cache.block_frames
    prompt = any_prompt(session)
    hog = multiprocessing.get_context("spawn").Process(
        target=burn, args=(max(affinity_cpus()), args.hog_seconds)
    )
    from_s = (args.seconds - args.hog_seconds) / 2
    rows: list[dict[str, Any]] = []
    hogged = [float("inf"), float("inf")]
    begin = due = perf_counter()
    with Progress("blocks", blocks) as progress:
        for block in session.generate(prompt, frames=frames, deadline_ms=deadline_ms):
            now = perf_counter()
            report = block.deadline
            if report is None:
                raise AsdError("the session gave a block without a deadline")
            rows.append(
                {"at_s": now - begin, "steps": report.steps, "taken_ms": report.taken_ms,
                 "planned_ms": report.planned_ms, "missed": report.missed}
            )  # fmt: skip
            progress.advance()
            if now - begin >= from_s and hogged[0] == float("inf"):
                hog.start()
                hogged[0] = perf_counter() - begin
            if hogged[0] < float("inf") and hogged[1] == float("inf") and not hog.is_alive():
                hogged[1] = perf_counter() - begin
            due = max(due + period, now)
            sleep(max(0.0, due - perf_counter()))
    hog.join()
    for row in rows:
        row["hog"] = hogged[0] <= row["at_s"] <= hogged[1]
    return rows


def summarise(rows: Sequence[dict[str, Any]], deadline_ms: float) -> dict[str, Any]:
    """What was promised, in figures; the first block, which has a budget of its own, is left out."""
    rows = rows[1:]
    inside = [i for i, row in enumerate(rows) if row["hog"]]
    after = inside[-1] + 1 if inside else len(rows)
    rest = [row for row in rows if not row["hog"]]
    usual = float(np.median([row["steps"] for row in rest])) if rest else 0.0
    recovery = next((i for i, row in enumerate(rows[after:]) if row["steps"] >= usual), None)
    within = [rows[i] for i in inside]
    settled = [
        r for i, r in enumerate(rows) if not r["hog"] and not 0 <= i - after < RECOVERY_BLOCKS
    ]

    def share(some: Sequence[dict[str, Any]]) -> float:
        return float(np.mean([row["missed"] for row in some])) if some else 0.0

    def fps_share(some: Sequence[dict[str, Any]]) -> float:
        """Blocks that came per deadline: 1 when the pace was kept."""
        ms = [max(row["taken_ms"], deadline_ms) for row in some]
        return float(len(ms) * deadline_ms / sum(ms)) if ms else 0.0

    return {
        "blocks": len(rows),
        "usual_steps": usual,
        "misses_outside": share(settled),
        "misses_inside": share(within),
        "steps_inside": float(np.mean([row["steps"] for row in within])) if within else None,
        "pace_outside": fps_share(settled),
        "pace_inside": fps_share(within),
        "recovery_blocks": recovery,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for a reader."""
    s, machine = report["summary"], report["machine"]
    return "\n".join(
        [
            f"# A deadline of {report['deadline_ms']:g} ms a block, with and without a busy core",
            "",
            f"{s['blocks']} blocks of {report['name']} in {report['seconds']:g} s, taken at the pace of the "
            f"deadline; a busy loop on one of {machine['cores']} cores for {report['hog_seconds']:g} s "
            "in the middle.",
            "",
            "| | outside | with the busy core |",
            "|---|---|---|",
            f"| steps a block | {s['usual_steps']:g} (median) | {s['steps_inside'] or 0:.2f} (mean) |",
            f"| missed deadlines | {s['misses_outside']:.2%} | {s['misses_inside']:.2%} |",
            f"| blocks that came per deadline | {s['pace_outside']:.3f} | {s['pace_inside']:.3f} |",
            "",
            f"Usual steps again {s['recovery_blocks']} blocks after the core was free. Outside leaves out "
            f"the {RECOVERY_BLOCKS} blocks after it.",
            "",
            f"- engine: {report['engine']}, {report['device']}",
            f"- machine: {machine['cpu']}, {machine['cores']} cores, load {machine['load_average'][0]}",
            f"- command: `{report['command']}`",
            "",
        ]
    )


def save_plot(report: dict[str, Any], path: Path) -> None:
    """Steps and durations over time."""
    rows = report["rows"][1:]
    at = [row["at_s"] for row in rows]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 5), dpi=130, sharex=True, layout="constrained"
    )
    top.plot(at, [row["taken_ms"] for row in rows], ".", markersize=2, color="#2a5caa")
    top.axhline(report["deadline_ms"], color=INK, linewidth=1)
    top.set_ylabel("ms a block (line: deadline)", color=SOFT_INK)
    bottom.step(at, [row["steps"] for row in rows], color="#2a5caa", where="post")
    bottom.set_ylabel("steps", color=SOFT_INK)
    bottom.set_xlabel("seconds", color=SOFT_INK)
    bottom.set_yticks(range(5))
    hogged = [row["at_s"] for row in rows if row["hog"]]
    for axes in (top, bottom):
        axes.grid(color=GRID)
        if hogged:
            axes.axvspan(hogged[0], hogged[-1], color="#f0a63c", alpha=0.2)
    top.set_title("A deadline plan while another program takes a core", loc="left", color=INK)
    figure.savefig(path, format="png")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hog",
        description="Stream to a deadline while a busy loop takes a core: JSON, a table and a plot.",
    )
    parser.add_argument("--engine", type=Path, help="engine file (default: the best one here)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder, made if absent")
    parser.add_argument(
        "--deadline-ms",
        type=float,
        help=f"of a block (default: {SPARE:g} times what one of {MAX_STEPS} steps takes here)",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of video (default 60)")
    parser.add_argument("--hog-seconds", type=float, default=10.0, help="of the busy core")
    args = parser.parse_args(argv)
    try:
        if args.deadline_ms is not None:
            check_deadline(args.deadline_ms)
        make_folder(args.out)
        with asd_rt.open(args.engine) as session:
            deadline_ms = args.deadline_ms
            if deadline_ms is None:
                deadline_ms = spare_deadline_ms(session)
            rows = stream(session, args, deadline_ms)
            report = {
                "format_version": 1,
                "name": session.manifest.name,
                "engine": str(session.engine.path),
                "device": session.engine.device,
                "machine": timing.describe_machine(),
                "versions": timing.versions(),
                "deadline_ms": deadline_ms,
                "seconds": args.seconds,
                "hog_seconds": args.hog_seconds,
                "command": "python -m benchmarks.hog "
                + " ".join(sys.argv[1:] if argv is None else argv),
                "summary": summarise(rows, deadline_ms),
                "rows": rows,
            }
        with replacing(args.out / "hog.json") as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        with replacing(args.out / "hog.md") as temporary:
            temporary.write_text(markdown(report))
        with replacing(args.out / "hog.png") as temporary:
            save_plot(report, temporary)
    except AsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
