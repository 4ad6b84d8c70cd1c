"""What the commands share: their result, and checks that collect every problem before any work."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_rt.arguments import frame_deadline_ms
from asd_rt.deadline import MAX_DEADLINE_MS
from asd_rt.engines import DEVICES, best_engine
from asd_rt.errors import AsdError
from asd_rt.manifest import Manifest, read_manifest
from asd_rt.schedule import MAX_STEPS

_SIZE = re.compile(r"([0-9]{1,6})[xX]([0-9]{1,6})")
_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_NUMBER = re.compile(
    r"[+-]?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})(e[+-]?[0-9]{1,3})?", re.IGNORECASE
)
LEAST_NUMBER, MAX_FPS = 0.001, 1e6


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


@dataclass(frozen=True, slots=True)
class Deadline:
    """A deadline as it was asked for: in ms a block, or in frames a second, or not at all."""

    ms: float | None = None
    fps: float | None = None

    def block_ms(self, manifest: Manifest) -> float | None:
        """Milliseconds that a block of this engine may take; None without a deadline."""
        return self.ms if self.fps is None else frame_deadline_ms(manifest, self.fps)

    def arguments(self, manifest: Manifest) -> dict[str, Any]:
        """Arguments of a session's `generate`: none without a deadline."""
        block_ms = self.block_ms(manifest)
        return {} if block_ms is None else {"deadline_ms": block_ms}


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

    def latent_size(self, flag: str, text: str | None) -> tuple[int, int] | None:
        """Latent (rows, columns), both even; None when not given."""
        if text is None:
            return None
        match = _SIZE.fullmatch(text)
        if match and all(int(n) >= 2 and int(n) % 2 == 0 for n in match.groups()):
            return int(match[1]), int(match[2])
        self.usage(f"{flag} must be two even numbers such as 60x104, found {text!r}")
        return None

    def number(self, flag: str, text: str | None, low: float, high: float) -> float | None:
        """The number that `flag` was given; None when it was not, or is no number in low..high."""
        if text is None:
            return None
        value = float(text) if _NUMBER.fullmatch(text) else None
        if value is not None and low <= value <= high:
            return value
        self.usage(f"{flag} must be a number from {low:g} to {high:.0f}, found {text!r}")
        return None

    def deadline(self, args: argparse.Namespace) -> Deadline:
        """What --deadline-ms or --fps ask for."""
        return Deadline(
            self.number("--deadline-ms", args.deadline_ms, LEAST_NUMBER, MAX_DEADLINE_MS),
            self.number("--fps", args.fps, LEAST_NUMBER, MAX_FPS),
        )

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
    """--engine, --device and --threads."""
    parser.add_argument(
        "--engine",
        metavar="PATH",
        help="engine file (default: the best in ./engines, else the one in the package)",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=DEVICES[0],
        help="what an .onnx engine runs on (default auto: the card where ONNX Runtime can use one)",
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


def add_deadline(parser: argparse.ArgumentParser) -> None:
    """--deadline-ms and --fps, one of them."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--deadline-ms",
        metavar="X",
        help="time a block may take: it gets as many steps as fit, at most --steps (default then: 4)",
    )
    group.add_argument(
        "--fps", metavar="X", help="the same, as frames of video a second that must keep coming"
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
