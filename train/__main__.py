"""`python -m train`: every stage from nothing to a scored student, resumable."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

from asd_rt.errors import ConfigError
from train.command_line import check_seed, exit_code

EXAMPLES = """examples:
  python -m train --config train/configs/tiny.toml --out runs/tiny
      the whole recipe of the shipped student, about 90 minutes on two cores with AMX
  python -m train --config train/configs/tiny.toml --out runs/tiny --resume
      go on after an interruption; finished stages are not repeated
  python -m train --config train/configs/tiny.toml --out runs/smoke --smoke
      every stage for a few steps, some minutes: does it run?
  python -m train --config train/configs/tiny.toml --out runs/tiny --resume --stages evaluate
      score alone; rows of the table that are there (in OUT/rows.json) are not made again
  python -m train --config train/configs/tiny.toml --out runs/b --teacher runs/tiny/teacher --init runs/tiny/init
      another distillation from the same start
  python -m train --config train/configs/wan_1_3b_asd.toml --dry-run --world-size 8
      check every file, and say what a step takes of 8 GPUs
  torchrun --nproc-per-node 8 -m train --config train/configs/wan_1_3b_asd.toml --out runs/wan
      distil Wan2.1 on the 8 GPUs of a machine

Every finished stage of the tiny world hands on its averaged network as a small checkpoint, OUT/teacher and
OUT/init. The student is written to OUT/student; build it with
  python -m export.build --steps 1 --checkpoint OUT/student
"""  # noqa: E501


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train teacher, causal initialisation and distilled student (DMD + ASD).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file, see train/configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="changes",
        help="change a setting of the file; may be given often",
    )
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps a stage, to test the code"
    )
    parser.add_argument(
        "--stages",
        help="comma-separated, of teacher, init, distill, evaluate; default: all that the "
        "configuration has",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="PATH",
        help="a finished teacher, as a run keeps it in OUT/teacher: do not train one",
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="PATH",
        help="a causal start of that teacher, as in OUT/init: do not train one; needs --teacher",
    )
    parser.add_argument(
        "--save-every",
        type=float,
        metavar="SECONDS",
        help="time between checkpoints (default 60; of real networks parallel.save_minutes says it)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="CPU threads (default: $OMP_NUM_THREADS, else usable cores)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: check every file, and print memory, tokens and FLOPs of a step",
    )
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="processes of a dry run (default 1)"
    )
    parser.add_argument("--json", action="store_true", help="print the dry run as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _stages(text: str | None, known: tuple[str, ...]) -> list[str]:
    if text is None:
        return list(known)
    stages = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in stages if name not in known]
    if unknown or not stages:
        raise ConfigError(
            f"--stages: unknown {', '.join(unknown) or 'empty list'}; known: {', '.join(known)}"
        )
    return stages


def _dry_run(args: argparse.Namespace) -> None:
    """Print what a distillation step takes, then check what it reads."""
    from train.config import load_config
    from train.dry_run import as_document, describe, make_plan
    from train.parallel import check_ranks
    from train.real_config import ParallelConfig
    from train.real_inputs import check_inputs
    from train.tiny_data import LATENT_HW

    config = load_config(args.config, args.changes)
    check_ranks(config.parallel or ParallelConfig(), args.world_size)
    latent_hw = LATENT_HW if config.data is None else config.data.latent_hw
    plan = make_plan(config, latent_hw, args.world_size)
    print(json.dumps(as_document(plan)) if args.json else describe(plan))
    if config.data is not None:
        check_inputs(config, args.world_size)


def _train(args: argparse.Namespace) -> None:
    from train import pipeline, real_models
    from train.config import load_config

    if args.out is None:
        raise ConfigError("--out is missing: name the folder of the run")
    check_seed(args.seed)
    if args.init is not None and args.teacher is None:
        raise ConfigError("--init needs the --teacher that it was made from")
    if args.save_every is not None and args.save_every < 0:
        raise ConfigError(f"--save-every must be a time >= 0, found {args.save_every}")
    config = load_config(args.config, args.changes)
    if args.smoke:
        config = config.smoke()
    began = time.monotonic()
    common = {
        "seed": args.seed,
        "resume": args.resume,
        "threads": args.threads,
    }
    if config.data is not None:
        given = [n for n in ("teacher", "init", "save_every") if getattr(args, n) is not None]
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(
                f"{flags}: of the tiny world; real networks have [weights] and [parallel]"
            )
        stages = _stages(args.stages, real_models.stages_of(config))
        real_models.run(config, args.out, stages=stages, **common)
    else:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise ConfigError("the tiny world trains in one process; start it without torchrun")
        stages = _stages(args.stages, pipeline.STAGES)
        command = f"python -m train --config {args.config} --seed {args.seed}"
        command += "".join(f" --set {change}" for change in args.changes)
        command += " --smoke" if args.smoke else ""
        for name, path in (("teacher", args.teacher), ("init", args.init)):
            command += "" if path is None else f" --{name} {path}"
        pipeline.run(
            config,
            args.out,
            stages=stages,
            command=command,
            teacher=args.teacher,
            init=args.init,
            save_every_s=60.0 if args.save_every is None else args.save_every,
            **common,
        )
    if int(os.environ.get("RANK", 0)) == 0:
        minutes = (time.monotonic() - began) / 60
        logging.info("done in %.1f minutes; student: %s", minutes, args.out / "student")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    work = _dry_run if args.dry_run else _train
    return exit_code(lambda: work(args), args.debug, "go on with --resume")


if __name__ == "__main__":
    sys.exit(main())
