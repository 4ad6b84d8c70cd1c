"""`asd-rt bench`: how fast an engine streams on this machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from asd_rt import timing
from asd_rt.bench import DEFAULT_BLOCKS, DEFAULT_REPEATS, DEFAULT_WARMUP, measure
from asd_rt.commands.common import (
    Outcome,
    Problems,
    add_deadline,
    add_engine,
    add_plan,
    find_engine,
)
from asd_rt.files import check_writable, replacing
from asd_rt.kv_cache import FrameSlots
from asd_rt.progress import Progress
from asd_rt.session import open_session

HELP = "measure latency and frames a second"
EXAMPLES = """examples:
  asd-rt bench
  asd-rt bench --engine engines/asd_fp32.onnx --steps 1 --first-steps 4 --blocks 32 --json bench.json
  asd-rt bench --engine engines/asd_fp32.onnx --json | jq .summary
  asd-rt bench --deadline-ms 20 --blocks 200
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench`."""
    add_engine(parser)
    add_plan(parser)
    add_deadline(parser)
    parser.add_argument(
        "--blocks", metavar="N", help=f"blocks of a video (default: {DEFAULT_BLOCKS})"
    )
    parser.add_argument(
        "--warmup", metavar="N", help=f"videos not measured (default: {DEFAULT_WARMUP})"
    )
    parser.add_argument(
        "--repeats", metavar="N", help=f"videos measured (default: {DEFAULT_REPEATS})"
    )
    parser.add_argument(
        "--latent-size", metavar="HxW", help="latent rows x columns, for an engine that fixes none"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="write one JSON document to FILE, or print it where no FILE is named",
    )


def execute(args: argparse.Namespace) -> Outcome:
    """Measure; text is a table.

    Raises:
        AsdError: anything the user can mend.
    """
    problems = Problems()
    steps = problems.steps("--steps", args.steps)
    first_steps = problems.steps("--first-steps", args.first_steps)
    deadline = problems.deadline(args)
    threads = problems.integer("--threads", args.threads, 1)
    blocks = problems.integer("--blocks", args.blocks, 1)
    warmup = problems.integer("--warmup", args.warmup, 0)
    repeats = problems.integer("--repeats", args.repeats, 1)
    latent_hw = _latent_size(problems, args.latent_size)
    to_file = args.json if isinstance(args.json, str) else None
    if to_file is not None:
        with problems.collect():
            check_writable(to_file, "--json")
    found = find_engine(problems, args.engine)
    if found:
        cache = found[1].cache
        if blocks is None:
            held = cache.max_frames // cache.block_frames if not cache.window_frames else 0
            blocks = min(DEFAULT_BLOCKS, held or DEFAULT_BLOCKS)
        with problems.collect():
            FrameSlots(cache, blocks * cache.block_frames)
    problems.raise_any()

    count = blocks or DEFAULT_BLOCKS
    warmup = DEFAULT_WARMUP if warmup is None else warmup
    repeats = DEFAULT_REPEATS if repeats is None else repeats
    with (
        open_session(found[0] if found else None, threads, device=args.device) as session,
        Progress("blocks", count * (warmup + repeats)) as progress,
    ):
        report = measure(
            session,
            blocks=count,
            steps=steps,
            first_steps=first_steps,
            warmup=warmup,
            repeats=repeats,
            latent_hw=latent_hw,
            deadline_ms=deadline.block_ms(session.manifest),
            on_block=progress.advance,
        )
    if to_file is not None:
        with replacing(to_file) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return Outcome(report, _text(report, to_file))


def _latent_size(problems: Problems, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    rows, _, columns = text.lower().partition("x")
    size = [int(n) if n.isascii() and n.isdecimal() else 0 for n in (rows, columns)]
    if min(size) < 2 or size[0] % 2 or size[1] % 2:
        problems.usage(f"--latent-size must be two even sizes such as 60x104, found {text!r}")
        return None
    return size[0], size[1]


def _plan_text(plan: dict[str, Any]) -> str:
    if "deadline_ms" in plan:
        return (
            f"at most {plan['first_steps']} steps, then {plan['steps']}, for a deadline of "
            f"{plan['deadline_ms']:g} ms a block"
        )
    return f"steps {plan['first_steps']} then {plan['steps']}"


def _text(report: dict[str, Any], to_file: str | None) -> str:
    machine = report["machine"]
    lines = [
        f"{report['engine']} ({report['precision']}) on {report['device']}, {machine['cpu']}",
        f"{report['repeats']} videos of {report['blocks']} blocks of {report['block_frames']} frames, "
        f"{_plan_text(report['plan'])}",
        "",
        timing.markdown_table(report["summary"]).rstrip(),
    ]
    return "\n".join([*lines, *(["", f"written to {to_file}"] if to_file else [])])
