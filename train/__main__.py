"""`python -m train`: every stage from nothing to a scored student, resumable."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from asd_rt.errors import AsdError, ConfigError

EXAMPLES = """examples:
  python -m train --config train/configs/tiny.toml --out runs/tiny
      the whole recipe of the shipped student, under 100 minutes on two cores
  python -m train --config train/configs/tiny.toml --out runs/tiny --resume
      go on after an interruption; finished stages are not repeated
  python -m train --config train/configs/tiny.toml --out runs/smoke --smoke
      every stage for a few steps, under 3 minutes: does it run?
  python -m train --config train/configs/tiny.toml --out runs/tiny --resume --stages evaluate
      score again

The student is written to OUT/student, with a model card; build it with
  python -m export.build --steps 1 --checkpoint OUT/student
"""


def _parser() -> argparse.ArgumentParser:
    from train.pipeline import STAGES

    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train teacher, causal initialisation and distilled student (DMD + ASD).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file, see train/configs/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps a stage, to test the code"
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help=f"comma-separated, of {','.join(STAGES)}"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: usable cores)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        from train.config import load_config
        from train.pipeline import STAGES, run

        stages = [name.strip() for name in args.stages.split(",") if name.strip()]
        unknown = [name for name in stages if name not in STAGES]
        if unknown or not stages:
            parser.error(
                f"--stages: unknown {', '.join(unknown) or 'empty list'}; known: {', '.join(STAGES)}"
            )
        if args.seed < 0:
            raise ConfigError(f"--seed must be a whole number >= 0, found {args.seed}")
        config = load_config(args.config)
        began = time.monotonic()
        run(
            config.smoke() if args.smoke else config,
            args.out,
            seed=args.seed,
            stages=stages,
            resume=args.resume,
            threads=args.threads,
            command="python -m train "
            + f"--config {args.config} --seed {args.seed}"
            + (" --smoke" if args.smoke else ""),
        )
        logging.info(
            "done in %.1f minutes; student: %s",
            (time.monotonic() - began) / 60,
            args.out / "student",
        )
    except AsdError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; go on with --resume", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
