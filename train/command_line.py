"""What the commands of train and export share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from asd_rt.errors import AsdError, ConfigError

INTERRUPTED = 130  # exit code, as of a shell
MAX_SEED = 2**32 - 1  # streams are derived from multiples of it, which torch takes up to 2**64


class Parser(argparse.ArgumentParser):
    """Argument errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def check_seed(seed: int, flag: str = "--seed") -> None:
    """Raise ConfigError for a seed outside 0 .. MAX_SEED."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"{flag} must be a whole number from 0 to {MAX_SEED}, found {seed}")


def exit_code(work: Callable[[], None], debug: bool, interrupted: str) -> int:
    """Do a command's work, and tell of a problem in a line.

    Args:
        work: prints its results.
        debug: raise errors, to see where they come from.
        interrupted: what is left after Ctrl-C, and how to go on.

    Returns:
        0; 1 after an error; 130 after Ctrl-C.
    """
    try:
        work()
    except AsdError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0
