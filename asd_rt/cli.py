"""The `asd-rt` command: parses, dispatches, prints results on stdout and problems on stderr.

Exit codes: 0 done, 1 user or environment error (a line each, no traceback), 2 usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from asd_rt import __version__
from asd_rt.commands.common import InputProblems, Outcome
from asd_rt.errors import AsdError

COMMANDS = ("run", "serve", "encode", "bench", "replay", "inspect", "doctor")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--verbose", action="store_true", help="log what is done, on stderr")
    parser = _Parser(
        prog="asd-rt",
        description="Stream video from a compiled causal denoiser, block by block.",
        epilog='start with: asd-rt run --prompt "a red three moving right" --out three.mp4',
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"asd-rt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"asd_rt.commands.{name}")
        command = commands.add_parser(
            name,
            parents=[common],
            help=module.HELP,
            description=(module.HELP[0].upper() + module.HELP[1:] + "."),
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(execute=module.execute)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    try:
        outcome: Outcome = args.execute(args)
        _show(outcome, as_json=args.json is True)
        return outcome.code
    except BrokenPipeError:
        _silence_stdout()
        return 1
    except KeyboardInterrupt:
        return _fail(["interrupted"], 1)
    except InputProblems as error:
        return _fail(error.lines, error.code)
    except AsdError as error:
        if args.debug:
            raise
        return _fail([str(error)], 1)
    except Exception as error:  # a fault of ours still is one line, and --debug shows the rest
        if args.debug:
            raise
        return _fail([f"unexpected {type(error).__name__}: {error}; --debug shows where"], 1)


def _show(outcome: Outcome, as_json: bool) -> None:
    stream = sys.stderr if outcome.to_stderr else sys.stdout
    text = json.dumps(outcome.document, indent=2) if as_json else outcome.text
    print(text, file=stream, flush=True)


def _fail(lines: list[str], code: int) -> int:
    for line in lines:
        print(f"asd-rt: error: {' '.join(line.split())}", file=sys.stderr)
    return code


def _silence_stdout() -> None:
    """Whoever read stdout has gone: what is left for it goes nowhere, without a complaint at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
