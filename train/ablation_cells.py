"""What the ablation consists of, and what is kept of it: one small JSON file a cell.

Three trainings a seed: DMD+ASD for the recipe's steps, DMD alone for as many, and the latter trained on
until it has taken as long as the former. Every one is judged at five plans (at 4 steps First-Frame
Enhancement changes nothing).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asd_rt.errors import ConfigError
from asd_rt.files import replacing
from asd_rt.plan import FixedPlan
from asd_rt.schedule import MAX_STEPS
from train.config import TrainConfig
from train.evaluation import Row

STEPS = (2, 1, 4)  # columns, in the order of the paper's table
PLANS = tuple(
    FixedPlan(steps, first) for steps in STEPS for first in dict.fromkeys((steps, MAX_STEPS))
)
PHASES = (("asd", "steps"), ("dmd", "steps"), ("dmd", "time"))
KEPT_DRAWS = ("total", "quality", "semantic", "all_right", "frechet")
REAL, TEACHER = "real", "teacher"  # results beside the cells
RESULTS, SETTINGS, TIMING = "results", "settings.json", "timing.json"
Result = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """A training up to some budget.

    Attributes:
        variant: "asd" (DMD and ASD) or "dmd" (DMD alone).
        budget: "steps": the recipe's; "time": as long as DMD+ASD takes for those.
        seed: of the distillation.
    """

    variant: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.budget}-seed{self.seed}"

    @property
    def training(self) -> str:
        """Of the training that it is a part of: more time is more steps of the same."""
        return f"{self.variant}-seed{self.seed}"


@dataclass(frozen=True)
class Cell:
    """A phase judged at one plan."""

    phase: Phase
    plan: FixedPlan

    @property
    def name(self) -> str:
        return f"{self.phase.name}-{self.plan.steps}steps-first{self.plan.first_steps}"


def phases(seeds: Iterable[int]) -> list[Phase]:
    """All trainings, seed by seed, so that a table is there after the first."""
    return [Phase(variant, budget, seed) for seed in seeds for variant, budget in PHASES]


def cells(phase: Phase) -> list[Cell]:
    """A phase at every plan."""
    return [Cell(phase, plan) for plan in PLANS]


def variant_config(config: TrainConfig, variant: str) -> TrainConfig:
    """The recipe with or without ASD; both keep their last average, which is what a budget buys."""
    ratio = config.distill.asd_ratio if variant == "asd" else 0.0
    return replace(config, distill=replace(config.distill, asd_ratio=ratio, select_every=0))


class Results:
    """The JSON files of an ablation's folder."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Open the folder; the first result begins it with `settings`: what all of its cells share.

        Raises:
            ConfigError: it was begun with others; all that differ are named.
            OutputError: it cannot be written.
        """
        self.out = out
        self._settings: Result = json.loads(json.dumps(settings))
        known = self._settings
        found = _read(out / SETTINGS) if (out / SETTINGS).exists() else known
        differ = [
            f"{key} {found.get(key)!r} (now {known.get(key)!r})"
            for key in sorted(found.keys() | known.keys())
            if found.get(key) != known.get(key)
        ]
        if differ:
            raise ConfigError(
                f"{out}: holds an ablation with other settings: {', '.join(differ)}; name another --out"
            )

    def _path(self, name: str) -> Path:
        return self.out / RESULTS / f"{name}.json"

    def has(self, name: str) -> bool:
        """Whether a result is there."""
        return self._path(name).exists()

    def read(self, name: str) -> Result:
        """A result.

        Raises:
            ConfigError: it cannot be read.
        """
        return _read(self._path(name))

    def write(self, name: str, row: Row, **more: Any) -> None:
        """Keep a row with what the report needs of its resamples."""
        draws = {key: [round(x, 3) for x in row.scores.draws[key]] for key in KEPT_DRAWS}
        self._begin()
        _write(self._path(name), {**row.to_json(), **more, "draws": draws})

    def timing(self) -> Result | None:
        """What a step of either variant takes, if it was measured."""
        path = self.out / TIMING
        return _read(path) if path.exists() else None

    def write_timing(self, timing: Result) -> None:
        """Keep what a step takes."""
        self._begin()
        _write(self.out / TIMING, timing)

    def _begin(self) -> None:
        (self.out / RESULTS).mkdir(parents=True, exist_ok=True)
        if not (self.out / SETTINGS).exists():
            _write(self.out / SETTINGS, self._settings)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values) + "\n")


def _read(path: Path) -> Result:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); delete it to make it again"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected an object, found {type(found).__name__}; delete it")
    return found
