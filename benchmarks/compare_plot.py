"""The picture of a comparison: how long every way takes, round by round, and how far ours is ahead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.latency_plot import GRID, INK, SOFT_INK

OURS, THEIRS = "#2a5caa", "#b9bdc7"


def save_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw `report` of benchmarks.compare as a PNG."""
    rows = sorted(report["rows"], key=lambda row: -row["video_ms"]["p50"])
    figure, axes = plt.subplots(figsize=(10, 0.9 + 0.62 * len(rows)), dpi=130, layout="constrained")
    for y, row in enumerate(rows):
        ms = np.array(row["all_video_ms"])
        colour = OURS if row["name"].startswith("asd-rt") else THEIRS
        axes.barh(y, row["video_ms"]["p50"], color=colour, height=0.62)
        axes.plot(ms, np.full(len(ms), y), "|", color=INK, alpha=0.35, markersize=9)
        ratio = report["ratios"].get(row["name"])
        label = f"{row['video_ms']['p50']:.1f} ms"
        if ratio and not row["name"].startswith("asd-rt"):
            label += f"   ours {ratio['p50']:.2f}x faster"
        axes.text(np.percentile(ms, 98) * 1.02, y, label, va="center", color=INK, fontsize=9.5)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], color=INK)
    axes.set_xlim(0, 1.45 * rows[0]["video_ms"]["p75"])
    axes.set_xlabel(
        f"ms for {report['blocks']} blocks, decoded (marks: single rounds)", color=SOFT_INK
    )
    axes.set_title(
        f"{report['name']} against PyTorch, same weights, noise and plan", loc="left", color=INK
    )
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, format="png")
    plt.close(figure)
