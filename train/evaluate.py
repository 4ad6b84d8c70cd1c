"""`python -m train.evaluate`: scores of checkpoints and engines of the tiny world."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from asd_rt import timing
from asd_rt.errors import ConfigError
from asd_rt.files import make_folder, replacing
from asd_rt.schedule import MAX_STEPS
from train.command_line import Parser, check_seed, exit_code
from train.config import load_config
from train.evaluation import EXPLANATION, Evaluation, Row, make_plans, markdown
from train.judge import load_judge, shipped_recipe
from train.pictures import contact_sheet
from train.samplers import EngineSubject, open_subject, open_teacher
from train.threads import use_threads

SHEET_CLIPS = 12
log = logging.getLogger("train.evaluate")
EXAMPLES = """examples:
  python -m train.evaluate train/tiny_student --out out/evaluation
      the shipped student at 1, 2, 3 and 4 steps, with and without First-Frame Enhancement, beside real clips
  python -m train.evaluate runs/tiny/student --teacher runs/tiny/teacher --later --sheets
      a run's student and its teacher; also frames 37-48 of longer videos; a contact sheet of each
  python -m train.evaluate engines/asd_int8.onnx train/tiny_student --steps 1 --first-steps 4 --clips 1024
      an engine, through its own text part and decoder, beside the student that it was built from

evaluation.json and evaluation.md in --out are written anew after every row.
"""


def _first(text: str) -> int | None:
    if text == "same":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected `same` or a number of steps, found {text!r}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m train.evaluate`."""
    parser = Parser(
        prog="python -m train.evaluate",
        description="Judge checkpoints and engines of the tiny world on the same prompts and noise.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "subjects",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="a checkpoint, or an .onnx or .plan engine",
    )
    add("--teacher", type=Path, metavar="PATH", help="its checkpoint: an upper bound by many steps")
    add("--teacher-steps", type=int, default=30, metavar="N", help="default 30")
    add("--guidance", type=float, help="of the teacher (default: the recipe's)")
    add("--steps", type=int, nargs="+", default=[1, 2, 3, 4], metavar="N", help="default 1 2 3 4")
    add(
        "--first-steps",
        type=_first,
        nargs="+",
        default=[None, MAX_STEPS],
        metavar="N",
        help="of the first block; `same`: no First-Frame Enhancement (default: same 4)",
    )
    add("--clips", type=int, default=512, metavar="N", help="a row (default 512)")
    add("--frames", type=int, metavar="N", help="of a clip (default: the recipe's)")
    add(
        "--later",
        action="store_true",
        help="judge also the last quarter of four times as long videos",
    )
    add("--seed", type=int, default=0, metavar="N", help="of prompts and noise (default 0)")
    add("--config", type=Path, help="recipe of judge and teacher (default: the shipped one)")
    add("--out", type=Path, default=Path("out/evaluation"), help="folder (default out/evaluation)")
    add(
        "--sheets",
        action="store_true",
        help=f"a picture of each subject: {SHEET_CLIPS} prompts as rows, a column for every plan",
    )
    add("--threads", type=int, default=0, metavar="N",
        help="CPU threads (default: $OMP_NUM_THREADS, else usable cores)")  # fmt: skip
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _check(args: argparse.Namespace) -> None:
    if not args.subjects and args.teacher is None:
        raise ConfigError("nothing to judge: name a checkpoint or an engine, or a --teacher")
    for flag, value, least in (
        ("--clips", args.clips, 2),
        ("--teacher-steps", args.teacher_steps, 1),
        ("--threads", args.threads, 0),
    ):
        if value < least:
            raise ConfigError(f"{flag} must be a whole number >= {least}, found {value}")
    check_seed(args.seed)
    for path in (*args.subjects, args.teacher):
        if path is not None and not path.exists():
            raise ConfigError(f"{path}: no such checkpoint or engine")


def evaluate(args: argparse.Namespace, command: str) -> list[Row]:
    """Judge all that `args` name; the report in args.out is whole after every row.

    Raises:
        AsdError: impossible arguments, a subject that cannot be opened, a folder that cannot be written.
    """
    _check(args)
    plans = make_plans(args.steps, args.first_steps)
    if not plans:
        raise ConfigError(
            "--steps and --first-steps: no plan gives the first block as many steps as the others"
        )
    config = shipped_recipe() if args.config is None else load_config(args.config)
    frames = config.clip_frames if args.frames is None else args.frames
    threads = use_threads(args.threads)
    make_folder(args.out)
    subjects = [open_subject(path, threads) for path in args.subjects]
    guidance = config.teacher_guidance if args.guidance is None else args.guidance
    teacher = None
    if args.teacher is not None:
        teacher = open_teacher(args.teacher, args.teacher_steps, guidance)
    for one in (*subjects, *([] if teacher is None else [teacher])):
        if frames < 2 or frames % one.block_frames:
            raise ConfigError(
                f"--frames must be a multiple of the {one.block_frames} frames of a block of {one.name}, "
                f"and at least 2, found {frames}"
            )
    evaluation = Evaluation(load_judge(config), args.clips, frames, args.seed)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        log.info("%s: total %s", row.title, row.scores.of("total").points())
        _write(args, rows, command)

    times = (False, True) if args.later else (False,)
    for later in times:
        add(evaluation.real(later))
    if teacher is not None:
        teacher.name = f"{teacher.name}, {args.teacher_steps} steps of the teacher"
        row, shown = evaluation.subject(teacher, None)
        add(row)
        if args.sheets:
            contact_sheet(shown[:SHEET_CLIPS], args.out / "teacher.png")
    for number, one in enumerate(subjects, 1):
        sheet = []
        for later in times:
            for plan in plans:
                row, shown = evaluation.subject(one, plan, later)
                add(row)
                if not later:
                    sheet.append(shown[:SHEET_CLIPS])
        if args.sheets:
            name = f"{number}-{Path(one.name).name}.png"
            contact_sheet(torch.cat(sheet), args.out / name, columns=len(sheet))
        if isinstance(one, EngineSubject):
            one.close()
    return rows


def _write(args: argparse.Namespace, rows: Sequence[Row], command: str) -> None:
    report = {
        "format_version": 1,
        "command": command,
        "seed": args.seed,
        "rows": [row.to_json() for row in rows],
        "machine": timing.describe_machine(),
    }
    with replacing(args.out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with replacing(args.out / "evaluation.md") as temporary:
        temporary.write_text(f"# Evaluation\n\n{EXPLANATION}\n\n{markdown(rows)}\n`{command}`\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = make_parser().parse_args(given)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    command = " ".join(["python -m train.evaluate", *given])
    return exit_code(
        lambda: print(markdown(evaluate(args, command))),
        args.debug,
        "the report holds the rows that were done",
    )


if __name__ == "__main__":
    sys.exit(main())
