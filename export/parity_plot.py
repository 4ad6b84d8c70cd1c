"""Pictures of a parity report: error frame by frame, and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asd_rt.errors import ConfigError
from asd_rt.files import replacing

COLOURS = ("#2a5caa", "#c2571a", "#3b8a4c", "#7d4fa3", "#8a8d94")
INK, GRID = "#26282d", "#e3e5ea"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            f"pictures need matplotlib, which cannot be imported ({error}); pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set_title(title, loc="left", color=INK)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def plot_frames(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Error against the frame, for every engine whose frames were measured, as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: `path` cannot be written.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(10, 4.5), dpi=130, layout="constrained")
    for number, entry in enumerate(entries):
        colour, drift = COLOURS[number % len(COLOURS)], entry["drift"]
        for key, style, what in (
            ("frames", "-", ""),
            ("frames_fed", ":", ", on torch's latents"),
        ):
            values = [float("nan") if x is None else x for x in drift[key]]
            frames = range(1, len(values) + 1)
            axes.plot(frames, values, style, color=colour, label=f"{entry['engine']}{what}", lw=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("latent frame", color=INK)
    _save(plt, figure, axes, "Relative L2 distance from float32 PyTorch, frame by frame", path)


def plot_layers(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What arises in each layer (bars) and the error of its output (line), as a PNG; see `plot_frames`."""
    plt = _pyplot()
    names = [layer["name"] for layer in entries[0]["layers"]]
    width = max(8.0, 0.16 * len(names) * max(1, len(entries) / 2))
    figure, axes = plt.subplots(figsize=(width, 5.5), dpi=130, layout="constrained")
    for number, entry in enumerate(entries):
        colour, share = COLOURS[number % len(COLOURS)], 0.8 / len(entries)
        found = {layer["name"]: layer for layer in entry["layers"]}
        layers = [found.get(name, {"own": None, "error": None}) for name in names]
        places = [i + (number - (len(entries) - 1) / 2) * share for i in range(len(names))]
        axes.bar(places, [layer["own"] or 0.0 for layer in layers], share, color=colour,
                 label=f"{entry['engine']}: arises in the layer")  # fmt: skip
        errors = [float("nan") if x["error"] is None else x["error"] for x in layers]
        axes.plot(range(len(names)), errors, color=colour, lw=1,
                  label=f"{entry['engine']}: error of its output")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.margins(x=0.01)
    _save(plt, figure, axes, "Relative L2 distance from float32 PyTorch, layer by layer", path)
