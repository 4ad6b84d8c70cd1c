"""The ablation's tables, in the shape of the paper's Table 2, and its plot.

Means over training seeds. Intervals are 95 % ones of a bootstrap over seeds and prompts: each resample
draws prompts once, for all seeds alike (they are judged on the same prompts), and seeds with replacement.
Of differences between two variants both come from the same draws. Few seeds make such an interval too
narrow rather than too wide.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asd_rt.files import replacing
from asd_rt.plan import FixedPlan
from asd_rt.schedule import MAX_STEPS
from train.ablation_cells import KEPT_DRAWS, PLANS, REAL, STEPS, TEACHER, Cell, Phase, Results
from train.evaluation import EXPLANATION, plan_name
from train.scores import RESAMPLES, Score

BOOTSTRAP = 2000
SHOWN = ("total", "quality", "semantic")
READINGS = (("steps", "Equal steps"), ("time", "Equal time"))
COMPARED = ("total", "quality", "semantic", "all_right")
INK, SOFT_INK, GRID = "#1c1e24", "#80848e", "#e6e7ea"
VARIANTS = (("dmd", "DMD", "#f0a63c"), ("asd", "DMD+ASD", "#2a5caa"))

Draws = NDArray[np.float64]  # [seeds, RESAMPLES]


def _interval(value: float, draws: Draws, seed: int = 0) -> Score:
    """Mean over seeds with an interval over seeds and prompts; see above."""
    generator = np.random.default_rng(seed)
    picked = generator.integers(0, len(draws), (BOOTSTRAP, len(draws)))
    prompts = generator.integers(0, RESAMPLES, (BOOTSTRAP, 1))
    low, high = np.percentile(draws[picked, prompts].mean(axis=1), [2.5, 97.5])
    return Score(value, float(low), float(high))


class Table:
    """Results of all finished cells: (variant, budget, plan) -> its seeds' results."""

    def __init__(self, results: Results, phases: Sequence[Phase]) -> None:
        self._found: dict[tuple[str, str, FixedPlan], dict[int, dict[str, Any]]] = {}
        for phase in phases:
            for plan in PLANS:
                name = Cell(phase, plan).name
                if results.has(name):
                    key = (phase.variant, phase.budget, plan)
                    self._found.setdefault(key, {})[phase.seed] = results.read(name)

    def seeds(self, variant: str, budget: str, plan: FixedPlan) -> dict[int, dict[str, Any]]:
        """Results by seed. DMD+ASD is what sets the time, so either budget is the same to it."""
        return self._found.get((variant, "steps" if variant == "asd" else budget, plan), {})

    def score(self, variant: str, budget: str, plan: FixedPlan, figure: str) -> Score | None:
        """A figure over all seeds that are there; None where none is."""
        found = list(self.seeds(variant, budget, plan).values())
        if not found:
            return None
        value = float(np.mean([r["figures"][figure][0] for r in found]))
        return _interval(value, np.array([r["draws"][figure] for r in found]))

    def gain(self, budget: str, plan: FixedPlan, figure: str) -> Score | None:
        """What ASD adds to DMD, over the seeds that both have."""
        asd, dmd = (self.seeds(variant, budget, plan) for variant in ("asd", "dmd"))
        both = sorted(asd.keys() & dmd.keys())
        if not both:
            return None
        value = np.mean([asd[s]["figures"][figure][0] - dmd[s]["figures"][figure][0] for s in both])
        draws = [np.subtract(asd[s]["draws"][figure], dmd[s]["draws"][figure]) for s in both]
        return _interval(float(value), np.array(draws))


def write_report(
    out: Path, results: Results, phases: Sequence[Phase], steps: int, plot: bool
) -> None:
    """Write ablation.md and ablation.json of what is there.

    Args:
        out: their folder.
        results: of the ablation.
        phases: all trainings that were asked for.
        steps: of a training.
        plot: draw ablation.png too.

    Raises:
        OutputError: they cannot be written.
    """
    table = Table(results, phases)
    bounds = {name: results.read(name) for name in (REAL, TEACHER) if results.has(name)}
    timing = results.timing()
    report = {
        "format_version": 1,
        "steps": steps,
        "timing": timing,
        "bounds": {name: found["figures"] for name, found in bounds.items()},
        "cells": [
            _cell_json(table, variant, budget, plan)
            for budget, _ in READINGS
            for variant, _, _ in VARIANTS
            for plan in PLANS
            if table.seeds(variant, budget, plan)
        ],
        "gains": [
            {
                "budget": budget,
                "steps": plan.steps,
                "first_steps": plan.first_steps,
                **{name: _numbers(table.gain(budget, plan, name)) for name in COMPARED},
            }
            for budget, _ in READINGS
            for plan in PLANS
            if table.gain(budget, plan, "total") is not None
        ],
    }
    with replacing(out / "ablation.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    with replacing(out / "ablation.md") as temporary:
        temporary.write_text(_markdown(table, bounds, timing, phases, steps))
    if plot and report["cells"]:
        with replacing(out / "ablation.png") as temporary:
            _plot(table, temporary)


def _numbers(score: Score | None) -> list[float] | None:
    return None if score is None else [round(x, 3) for x in (score.value, score.low, score.high)]


def _cell_json(table: Table, variant: str, budget: str, plan: FixedPlan) -> dict[str, Any]:
    found = table.seeds(variant, budget, plan)
    return {
        "variant": variant,
        "budget": budget,
        "steps": plan.steps,
        "first_steps": plan.first_steps,
        "training_steps": {seed: r["training_steps"] for seed, r in found.items()},
        "step_s": {seed: r["training_step_s"] for seed, r in found.items()},
        **{name: _numbers(table.score(variant, budget, plan, name)) for name in KEPT_DRAWS},
        "seeds": {seed: r["figures"] for seed, r in found.items()},
    }


def _markdown(
    table: Table,
    bounds: dict[str, dict[str, Any]],
    timing: dict[str, Any] | None,
    phases: Sequence[Phase],
    steps: int,
) -> str:
    seeds = sorted({phase.seed for phase in phases})
    lines = [
        "# Ablation",
        "",
        f"Training seeds {', '.join(map(str, seeds))}; teacher and causal start are shared. A cell: total / "
        "quality / semantic, means over seeds, with 95 % bootstrap intervals over seeds and prompts.",
        EXPLANATION,
        "",
    ]
    for name, found in bounds.items():
        told = " / ".join(f"{found['figures'][figure][0]:.1f}" for figure in SHOWN)
        lines.append(f"- {found['name'] if name == TEACHER else 'real, held-out glyphs'}: {told}")
    for budget, heading in READINGS:
        lines += ["", f"## {heading}", "", _budget(budget, timing, steps), ""]
        lines += ["| ASD | FFE | 2 steps | 1 step | 4 steps |", "|---|---|---|---|---|"]
        for enhanced in (False, True):
            for variant, _, _ in VARIANTS:
                row = [_cell(table, variant, budget, n, enhanced) for n in STEPS]
                marks = ["yes" if x else "no" for x in (variant == "asd", enhanced)]
                lines.append(f"| {' | '.join([*marks, *row])} |")
        lines += [
            "",
            "What ASD adds (same seeds, same prompts); **bold** where the interval leaves out 0:",
            "",
        ]
        lines += [f"| | {' | '.join(COMPARED).replace('_', ' ')} |", "|---" * 5 + "|"]
        for plan in PLANS:
            gains = [_gain(table.gain(budget, plan, figure)) for figure in COMPARED]
            lines.append(f"| {plan_name(plan)} | {' | '.join(gains)} |")
    return "\n".join(lines) + "\n"


def _budget(budget: str, timing: dict[str, Any] | None, steps: int) -> str:
    if budget == "steps":
        return f"{steps} steps of each."
    if timing is None:
        return "Steps are not timed yet."
    return (
        f"A step takes {timing['asd_step_s']:.2f} s with ASD and {timing['dmd_step_s']:.2f} s without "
        f"({timing['steps']} steps of each in turns, {timing['machine']['cpu']}), so DMD alone gets "
        f"{timing['equal_time_steps']} steps, DMD+ASD {steps} (of which those that warm up are without ASD)."
    )


def _cell(table: Table, variant: str, budget: str, steps: int, enhanced: bool) -> str:
    if enhanced and steps == MAX_STEPS:
        return "the same"
    plan = FixedPlan(steps, MAX_STEPS if enhanced else steps)
    found = [table.score(variant, budget, plan, figure) for figure in SHOWN]
    return "<br>/ ".join("-" if score is None else score.points() for score in found)


def _gain(score: Score | None) -> str:
    if score is None:
        return "-"
    told = f"{score.value:+.1f} [{score.low:+.1f}, {score.high:+.1f}]"
    return f"**{told}**" if score.low > 0 or score.high < 0 else told


def _plot(table: Table, path: Path) -> None:
    """Figures against steps: a row for either budget, lines for variants, hollow marks with FFE."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (len(READINGS), len(SHOWN))
    figure, axes = plt.subplots(*size, figsize=(12, 6.6), dpi=130, layout="constrained")
    for row, (budget, heading) in zip(axes, READINGS, strict=True):
        for axis, name in zip(row, SHOWN, strict=True):
            for variant, label, colour in VARIANTS:
                for enhanced in (False, True):
                    _line(axis, table, variant, budget, enhanced, name, label, colour)
            axis.set_title(f"{name}, {heading.lower()}", loc="left", color=INK, fontsize=10)
            axis.set_xticks(range(3), ["1 step", "2 steps", "4 steps"], color=SOFT_INK)
            axis.grid(color=GRID)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, format="png")
    plt.close(figure)


def _line(
    axis: Any,
    table: Table,
    variant: str,
    budget: str,
    enhanced: bool,
    name: str,
    label: str,
    colour: str,
) -> None:
    points = []
    for place, steps in enumerate(sorted(STEPS)):
        plan = FixedPlan(steps, MAX_STEPS if enhanced else steps)
        found = table.score(variant, budget, plan, name)
        if found is not None:
            points.append((place, found))
    if not points:
        return
    shift = 0.03 * (2 * (variant == "asd") + enhanced - 1.5)
    axis.errorbar(
        [place + shift for place, _ in points],
        [score.value for _, score in points],
        yerr=np.abs([[s.value - s.low, s.high - s.value] for _, s in points]).T,
        color=colour,
        linestyle="--" if enhanced else "-",
        marker="o",
        markerfacecolor="white" if enhanced else colour,
        linewidth=1.4,
        capsize=2.5,
        label=f"{label}, FFE" if enhanced else label,
    )
