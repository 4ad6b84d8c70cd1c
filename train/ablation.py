"""`python -m train.ablation`: {DMD, DMD+ASD} x {FFE, no FFE} x {1, 2, 4 steps}, over several seeds.

Teacher and causal start are given and shared by all trainings; seeds vary the distillation. See
`train.ablation_cells` for what is trained, and `train.ablation_report` for what is written.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from asd_rt.errors import ConfigError
from asd_rt.files import make_folder
from train.ablation_run import Ablation
from train.command_line import Parser, check_seed, exit_code
from train.config import load_config
from train.handover import take_up
from train.threads import use_threads

log = logging.getLogger("train.ablation")
EXAMPLES = """examples:
  python -m train.ablation --config train/configs/tiny.toml --run runs/tiny --out runs/ablation
      everything, with the teacher and the causal start of a finished run
  python -m train.ablation --config train/configs/tiny.toml --teacher DIR --init DIR --out runs/ablation --max-minutes 55
      for 55 minutes; the same command goes on from there, as it does after any interruption
  python -m train.ablation ... --list
      what is done, what is left, and how long it will take

Written to --out: ablation.md and .json after every training, .png at the end of a sitting; results/, a small file for every cell, which is
all that has to be carried to another machine; students/ and trainings/. A training that was begun needs its folder
in trainings/ to go on; without it, it begins again.
"""  # noqa: E501


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m train.ablation`."""
    parser = Parser(
        prog="python -m train.ablation",
        description="Train with and without ASD, judge with and without FFE, at 1, 2 and 4 steps.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="the recipe, a TOML file")
    add("--run", type=Path, metavar="FOLDER", help="a finished run: its teacher/ and init/")
    add("--teacher", type=Path, metavar="PATH", help="the teacher, in place of --run's")
    add("--init", type=Path, metavar="PATH", help="the causal start, in place of --run's")
    add("--out", type=Path, required=True, help="folder, made if absent")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2")
    add("--clips", type=int, help="judged a cell (default: the recipe's eval_clips)")
    add("--steps", type=int, metavar="N", help="of a training (default: the recipe's)")
    add("--smoke", action="store_true", help="a few steps a training, to test the code")
    add("--max-minutes", type=float, metavar="M", help="stop at a checkpoint after so long")
    add(
        "--timing-steps",
        type=int,
        default=30,
        metavar="N",
        help="steps of either variant, in turns, that measure what equal time is (default 30)",
    )
    add(
        "--list",
        action="store_true",
        help="show cells done and left, and the time left; train nothing",
    )
    add("--threads", type=int, default=0, metavar="N",
        help="CPU threads (default: $OMP_NUM_THREADS, else usable cores)")  # fmt: skip
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def open_ablation(args: argparse.Namespace, began: float) -> Ablation:
    """What `args` ask for.

    Raises:
        AsdError: impossible arguments, or files that are missing or do not fit.
    """
    paths = {}
    for name in ("teacher", "init"):
        path = getattr(args, name) or (args.run / name if args.run else None)
        if path is None:
            raise ConfigError(
                f"the ablation starts from a teacher and a causal start: give --run, or --{name}"
            )
        paths[name] = path
    for flag, value, least in (
        ("--clips", args.clips, 2),
        ("--steps", args.steps, 1),
        ("--timing-steps", args.timing_steps, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{flag} must be a whole number >= {least}, found {value}")
    for seed in args.seeds:
        check_seed(seed, "--seeds")
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError(f"--seeds must be different whole numbers, found {args.seeds}")
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise ConfigError(f"--max-minutes must be > 0, found {args.max_minutes}")
    config = load_config(args.config)
    if args.smoke:
        config = config.smoke()
    if args.steps is not None:
        config = replace(config, distill=replace(config.distill, steps=args.steps))
    if config.distill.asd_ratio <= 0:
        raise ConfigError(
            f"{args.config}: distill.asd_ratio must be > 0 to have something to compare"
        )
    teacher, init = (take_up(paths[name], name, config) for name in ("teacher", "init"))
    make_folder(args.out)
    deadline = None if args.max_minutes is None else began + 60 * args.max_minutes
    clips = args.clips or config.eval_clips
    return Ablation(config, teacher, init, args.out, args.seeds, clips, deadline)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    began = time.monotonic()
    args = make_parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    use_threads(args.threads)

    def work() -> None:
        ablation = open_ablation(args, began)
        if args.list:
            print(ablation.listing())
            return
        done = ablation.run(args.timing_steps)
        if not done:
            ablation.report(plot=True)
            log.info("time is up; the same command goes on; %s", ablation.time_left())
        print((args.out / "ablation.md").read_text())

    return exit_code(work, args.debug, "the same command goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
