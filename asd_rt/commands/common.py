"""What the commands share: their result, and checks that collect every problem before any work."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_rt.engines import best_engine
from asd_rt.errors import AsdError
from asd_rt.manifest import Manifest, read_manifest
from asd_rt.schedule import MAX_STEPS

_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command found: a JSON document, the same as text, and its exit code.

    `to_stderr` where stdout carries the video.
    """

    document: dict[str, Any]
    text: str
    code: int = 0
    to_stderr: bool = False


class InputProblems(AsdError):
    """All problems with a command's input, a line each; exit code 2 when a flag's value is one of them."""

    def __init__(self, lines: list[str], code: int) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.code = code


class Problems:
    """Collects what is wrong with a command's input, to report it at once."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._code = 1

    def usage(self, line: str) -> None:
        """A flag has an impossible value."""
        self._lines.append(line)
        self._code = 2

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note an error of ours instead of raising it."""
        try:
            yield
        except AsdError as error:
            self.note(error)

    def note(self, error: AsdError) -> None:
        """Something that is not a flag's value is wrong."""
        self._lines.append(str(error))

    def integer(self, flag: str, text: str | None, low: int, high: int | None = None) -> int | None:
        """The whole number that `flag` was given; None when it was not, or is no number in low..high."""
        if text is None:
            return None
        value = int(text) if _INTEGER.fullmatch(text) else None
        if value is not None and low <= value and (high is None or value <= high):
            return value
        limits = f">= {low}" if high is None else f"from {low} to {high}"
        self.usage(f"{flag} must be a whole number {limits}, found {text!r}")
        return None

    def steps(self, flag: str, text: str | None) -> int | None:
        """Denoising steps, 1..4."""
        return self.integer(flag, text, 1, MAX_STEPS)

    def raise_any(self) -> None:
        """Raise InputProblems if there are any."""
        if self._lines:
            raise InputProblems(self._lines, self._code)


def find_engine(problems: Problems, engine: str | None) -> tuple[Path, Manifest] | None:
    """The engine asked for (or the best one) and its manifest; None, and a problem noted, without one."""
    try:
        path = best_engine() if engine is None else Path(engine)
        return path, read_manifest(path)
    except AsdError as error:
        problems.note(error)
        return None


def add_engine(parser: argparse.ArgumentParser) -> None:
    """--engine and --threads."""
    parser.add_argument(
        "--engine",
        metavar="PATH",
        help="engine file (default: the best in ./engines, else the one in the package)",
    )
    parser.add_argument("--threads", metavar="N", help="CPU threads (default: usable cores)")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """--steps and --first-steps."""
    parser.add_argument(
        "--steps", metavar="N", help="denoising steps of a block, 1 to 4 (default: the engine's)"
    )
    parser.add_argument(
        "--first-steps",
        metavar="N",
        help="steps of the first block (first-frame enhancement; default: the engine's, at least --steps)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json as a switch."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns, aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def size_text(count: int) -> str:
    """Bytes for people: "6.8 MB"."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
