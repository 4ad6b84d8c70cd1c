"""What a run looks like while it trains: curve.jsonl, TensorBoard events, and report.html, a page of its own.

The page needs no server and nothing from elsewhere: curves as SVG, contact sheets beside it. It is written
anew with every checkpoint and asks the browser to reload while the run goes on.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from asd_rt.errors import OutputError
from asd_rt.files import replacing

CURVE, EVENTS, PAGE = "curve.jsonl", "tensorboard", "report.html"
POINTS = 300  # of a line on the page
SMOOTHING = 40  # points that a smooth line looks back on
WIDTH, HEIGHT = 360, 120
RELOAD_S = 30
Record = dict[str, Any]


def read_curve(path: Path) -> list[Record]:
    """The records of a curve; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class Curves:
    """Takes the figures of a stage's steps; use it in a `with`."""

    def __init__(self, run_dir: Path, stage: str, start: int, steps: int) -> None:
        """Open the curves in `run_dir` for the steps `start` .. `steps` of `stage`.

        Steps that ran after the last checkpoint run again, so their records are dropped.

        Raises:
            OutputError: the folder cannot be written.
        """
        self._dir, self._stage, self._steps = run_dir, stage, steps
        path = run_dir / CURVE
        self._records = [
            r for r in read_curve(path) if r.get("stage") != stage or r.get("step", 0) < start
        ]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self._records))
        self._lines = path.open("a")
        self._events = _events(run_dir / EVENTS)

    def add(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """Figures of one step, and how long it took."""
        record = {"stage": self._stage, "step": step, "seconds": round(seconds, 4)}
        record |= {name: round(value, 6) for name, value in figures.items()}
        self._records.append(record)
        try:
            self._lines.write(json.dumps(record) + "\n")
        except OSError as error:
            raise self._full(error) from error
        if self._events is not None:
            for name, value in figures.items():
                self._events.add_scalar(f"{self._stage}/{name}", value, step)

    def flush(self) -> None:
        """Bring everything to the disk, and write the page."""
        try:
            self._lines.flush()
            if self._events is not None:
                self._events.flush()
        except OSError as error:
            raise self._full(error) from error
        write_page(self._dir, self._records, {self._stage: self._steps})

    def _full(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self._dir / CURVE}: cannot be written ({error.strerror or error}); make room and run again "
            "with --resume: the last checkpoint is whole"
        )

    def __enter__(self) -> Curves:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # said where it was written
            self._lines.close()
        if self._events is not None:
            self._events.close()


def _events(folder: Path) -> Any:
    """A TensorBoard writer, or None where tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of a stage: steps, values, and the values smoothed."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]

    def smooth(self) -> list[float]:
        """The mean of each point and those before it, newer ones counting more."""
        found, mean, weight = [], 0.0, 0.0
        keep = 1 - 1 / SMOOTHING
        for value in self.values:
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
            found.append(mean / weight)
        return found


def lines_of(records: Iterable[Record]) -> dict[str, list[Line]]:
    """Stage -> its lines, in the order of their first appearance."""
    columns: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in records:
        stage = columns.setdefault(record["stage"], {})
        for name, value in record.items():
            if name not in ("stage", "step"):
                steps, values = stage.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return {
        stage: [Line(name, *column) for name, column in named.items()]
        for stage, named in columns.items()
    }


def write_page(run_dir: Path, records: Sequence[Record], running: Mapping[str, int]) -> None:
    """Write report.html: every stage's curves, progress of those `running` (name -> steps), and pictures.

    Raises:
        OutputError: it cannot be written.
    """
    parts = []
    for stage, lines in lines_of(records).items():
        parts.append(_stage(stage, lines, running.get(stage), _pictures(run_dir, stage)))
    unfinished = any(
        lines[0].steps[-1] + 1 < running.get(stage, 0) for stage, lines in lines_of(records).items()
    )
    reload = f'<meta http-equiv="refresh" content="{RELOAD_S}">' if unfinished else ""
    name = html.escape(run_dir.resolve().name)
    page = _PAGE.format(name=name, reload=reload, time=time.strftime("%Y-%m-%d %H:%M:%S"),
                        parts="\n".join(parts) or "<p>No step is done yet.</p>")  # fmt: skip
    with replacing(run_dir / PAGE) as temporary:
        temporary.write_text(page)


def _pictures(run_dir: Path, stage: str) -> list[str]:
    """Contact sheets of a stage, newest first."""
    return sorted((p.name for p in run_dir.glob(f"samples_{stage}*.png")), reverse=True)


def _stage(stage: str, lines: Sequence[Line], steps: int | None, pictures: Sequence[str]) -> str:
    done = lines[0].steps[-1] + 1
    seconds = next((line for line in lines if line.name == "seconds"), None)
    told = f"{done} steps"
    if steps is not None and done < steps:
        told = f"{done} of {steps} steps"
        if seconds is not None:
            left = (steps - done) * seconds.smooth()[-1] / 60
            told += f", {left:.0f} min left at {seconds.smooth()[-1]:.2f} s a step"
    charts = "".join(_chart(line) for line in lines)
    shown = "".join(
        f'<figure><img src="{p}" alt="{p}"><figcaption>{p}</figcaption></figure>'
        for p in pictures[:3]
    )
    return f"<h2>{html.escape(stage)}</h2><p>{told}</p><div class=charts>{charts}</div>{shown}"


def _chart(line: Line) -> str:
    """One figure as SVG: all points faint, the smoothed line strong, extreme values in words."""
    every = max(1, len(line.steps) // POINTS)
    picked = [*range(0, len(line.steps), every)]
    if picked[-1] != len(line.steps) - 1:
        picked.append(len(line.steps) - 1)
    smooth = line.smooth()
    low, high = min(line.values), max(line.values)
    span, first = (high - low) or 1.0, line.steps[0]
    length = (line.steps[-1] - first) or 1

    def path(values: Sequence[float]) -> str:
        points = (
            (WIDTH * (line.steps[i] - first) / length, HEIGHT * (high - values[i]) / span)
            for i in picked
        )
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)

    return (
        f"<figure class=chart><figcaption><b>{html.escape(line.name)}</b> {smooth[-1]:.4g} "
        f"<small>({low:.3g} to {high:.3g}, steps {first} to {line.steps[-1]})</small></figcaption>"
        f'<svg viewBox="-2 -4 {WIDTH + 4} {HEIGHT + 8}" role="img" aria-label="{html.escape(line.name)}">'
        f'<polyline class=raw points="{path(line.values)}"/>'
        f'<polyline class=smooth points="{path(smooth)}"/></svg></figure>'
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>{reload}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --line: #2563eb; --faint: #2563eb40; --edge: #8884; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0; }} h2 {{ margin: 2rem 0 0; font-size: 1.2rem; }}
p {{ margin: .2rem 0 1rem; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} figcaption {{ font-size: .85rem; }} small {{ opacity: .7; }}
.chart {{ border: 1px solid var(--edge); border-radius: 8px; padding: .6rem; }}
svg {{ width: 100%; display: block; }} img {{ width: 100%; margin-top: 1rem; image-rendering: pixelated; }}
polyline {{ fill: none; stroke-width: 1.5; vector-effect: non-scaling-stroke; stroke-linejoin: round; }}
.raw {{ stroke: var(--faint); }} .smooth {{ stroke: var(--line); }}
</style></head><body>
<h1>{name}</h1><p>Written {time}. Faint: every step; strong: smoothed.</p>
{parts}
</body></html>
"""
