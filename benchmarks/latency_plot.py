"""The picture of a latency report: where a block's time goes, how steady it is, and the figures in large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asd_rt.timing import later_blocks

INK, SOFT_INK, GRID = "#1c1e24", "#80848e", "#e6e7ea"
# Tell apart without colour vision too: they differ in lightness.
STAGES = (
    ("denoise_ms", "denoise", "#2a5caa"),
    ("cache_ms", "cache pass", "#f0a63c"),
    ("decode_ms", "decode", "#8fc7b5"),
)


def save_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw `report` of benchmarks.latency as a PNG."""
    figure = plt.figure(figsize=(11, 6.2), dpi=130, facecolor="white")
    grid = figure.add_gridspec(
        2,
        2,
        height_ratios=(1, 3.4),
        width_ratios=(2.3, 1),
        left=0.07,
        right=0.97,
        top=0.9,
        bottom=0.13,
    )
    _title(figure, report)
    _headline(figure.add_subplot(grid[0, :]), report)
    _bars(figure.add_subplot(grid[1, 0]), report["records"])
    _distribution(figure.add_subplot(grid[1, 1]), report)
    machine = report["machine"]
    figure.text(
        0.07,
        0.025,
        f"{machine['cpu']}, {machine['cores']} cores, {report['device']}    "
        f"{Path(report['engine']).name}, sha256 {report['sha256'][:12]}",
        color=SOFT_INK,
        fontsize=8.5,
    )
    figure.savefig(path, format="png")
    plt.close(figure)


def _title(figure: Figure, report: Mapping[str, Any]) -> None:
    plan = report["plan"]
    figure.text(0.07, 0.94, f"Latency of {report['name']}", fontsize=15, weight="bold", color=INK)
    figure.text(
        0.97,
        0.94,
        f"{plan['first_steps']} steps for the first block, {plan['steps']} for later ones; "
        f"{report['repeats']} videos of {report['blocks']} blocks",
        fontsize=9.5,
        color=SOFT_INK,
        ha="right",
    )


def _headline(axes: Axes, report: Mapping[str, Any]) -> None:
    """The four figures that matter most."""
    axes.set_axis_off()
    summary = report["summary"]
    later = summary["block_ms"] or summary["first_block_ms"]
    fps = summary["fps"]["sustained"]
    figures = [
        (f"{summary['first_frame_ms']['p50']:.1f} ms", "time to first frame, p50"),
        (f"{later['p50']:.1f} ms", f"a later block, p50 (p99 {later['p99']:.1f})"),
        (
            "-" if fps["with_decode"] is None else f"{fps['with_decode']:.0f} fps",
            "sustained, with decode",
        ),
        (f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB", "peak memory"),
    ]
    for i, (value, label) in enumerate(figures):
        axes.text(i / 4, 0.5, value, fontsize=21, color=INK, transform=axes.transAxes)
        axes.text(i / 4, 0.2, label, fontsize=9.5, color=SOFT_INK, transform=axes.transAxes)


def _bars(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Per block, the median over all runs, split into stages."""
    blocks = sorted({r["block"] for r in records})
    bottom = np.zeros(len(blocks))
    for key, label, colour in STAGES:
        heights = np.array(
            [np.median([r[key] or 0.0 for r in records if r["block"] == b]) for b in blocks]
        )
        if heights.any():
            axes.bar(blocks, heights, 0.78, bottom=bottom, color=colour, label=label)
        bottom += heights
    steps = {r["block"]: r["steps"] for r in records}
    for block, top in zip(blocks, bottom, strict=True):
        axes.annotate(
            str(steps[block]),
            (block, top),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=SOFT_INK,
        )
    _plain(axes, "Time of each block, median (number above: its steps)")
    axes.set_xlabel("block", color=SOFT_INK)
    axes.set_ylabel("ms", color=SOFT_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.01)
    axes.legend(frameon=False, fontsize=9, loc="upper right", labelcolor=INK)


def _distribution(axes: Axes, report: Mapping[str, Any]) -> None:
    """Share of later blocks that took at most so long."""
    later = later_blocks(report["records"]) or report["records"]
    ms = np.sort([r["block_ms"] for r in later])
    share = 100 * np.arange(1, len(ms) + 1) / len(ms)
    axes.step(ms, share, where="post", color=STAGES[0][2], linewidth=2)
    percents = (50, 95, 99)
    values = np.percentile(ms, percents)
    axes.plot(values, percents, "o", color=INK, markersize=4)
    lines = [f"p{p}   {v:.2f} ms" for p, v in zip(percents, values, strict=True)]
    axes.text(
        0.97,
        0.06,
        "\n".join(lines),
        ha="right",
        va="bottom",
        fontsize=9.5,
        color=INK,
        linespacing=1.6,
        transform=axes.transAxes,
    )
    _plain(axes, "Later blocks done within")
    axes.set_xlabel("ms", color=SOFT_INK)
    axes.set_ylabel("% of blocks", color=SOFT_INK)
    axes.set_ylim(0, 103)
    low, high = ms[0], max(np.percentile(ms, 99.5), ms[0] * 1.05)
    axes.set_xlim(low - 0.1 * (high - low), high + 0.6 * (high - low))


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10.5, color=INK, loc="left", pad=10)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT_INK, length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
