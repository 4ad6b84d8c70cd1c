"""The parity report as JSON and Markdown: of one engine beside it by every build, of several on demand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asd_rt.files import replacing
from asd_rt.manifest import Manifest
from export.drift import EARLY_BLOCKS, Drift
from export.layer_errors import LayerError

ROWS = 16  # of the table of frames
WORST = 5  # layers that are named
EARLY = f"first_{EARLY_BLOCKS}_blocks"
Entry = Mapping[str, Any]


def report_files(engine: Path) -> tuple[Path, Path]:
    """JSON and Markdown of the report that lies beside an engine."""
    return Path(f"{engine}.parity.json"), Path(f"{engine}.parity.md")


def make_entry(
    name: str,
    manifest: Manifest,
    figures: Mapping[str, Any],
    drift: Drift | None = None,
    layers: Sequence[LayerError] = (),
    semantics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a report says of one engine.

    Args:
        name: of its file.
        manifest: of it.
        figures: of the gate, as in a manifest.
        drift: frame by frame; None = the summary in `figures` is all there is.
        layers: in the order of the network; none where they were not asked for.
        semantics: see `export.semantics.compare`.
    """
    weights = manifest.parts.get("weights")
    return {
        "engine": name,
        "precision": manifest.precision,
        "checkpoint": dict(manifest.checkpoint),
        "bytes": sum(part.bytes for part in manifest.parts.values()),
        "weights_bytes": None if weights is None else weights.bytes,
        "parity": {key: value for key, value in figures.items() if key != "drift"},
        "drift": figures.get("drift") if drift is None else drift.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "semantics": semantics,
    }


def write_report(json_file: Path, markdown_file: Path, entries: Sequence[Entry]) -> None:
    """Write both forms, each whole or not at all.

    Raises:
        OutputError: one cannot be written.
    """
    document = {
        "metric": "relative L2 distance from float32 torch, same noise and plan",
        "engines": list(entries),
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    for path, content in ((json_file, text), (markdown_file, markdown(entries))):
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")


def markdown(entries: Sequence[Entry]) -> str:
    """The report for people."""
    lines = ["# Parity with float32 PyTorch", "", *_overview(entries)]
    for entry in entries:
        lines += ["", f"## {entry['engine']}", "", *_details(entry)]
    return "\n".join(lines) + "\n"


def _overview(entries: Sequence[Entry]) -> list[str]:
    blocks = max((entry["drift"]["blocks"] for entry in entries if entry["drift"]), default=0)
    lines = [
        "Relative L2 distance from float32 torch, same noise and plan. A pass gets the very inputs of "
        "torch's; a rollout goes on from its own results, so that errors come back through the cache and a "
        "video may in the end become another one. On torch's latents, the cache is filled from those, and "
        "only what the engine adds is seen.",
        "",
        f"| engine | MB | worst pass | budget | first {EARLY_BLOCKS} blocks | all {blocks} blocks | "
        "last block | last block, on torch's latents |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        parity, drift = entry["parity"], entry["drift"] or {}
        passes = parity.get("pass", {})
        cells = [
            entry["engine"] + (" (inaccurate)" if parity.get("inaccurate") else ""),
            f"{entry['bytes'] / 1e6:.2f}",
            _worst(passes),
            _figure(parity.get("budget", {}).get("pass")),
            *(_figure(drift.get(k)) for k in (EARLY, "all_blocks", "last_block", "last_block_fed")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    judged = [entry for entry in entries if entry["semantics"]]
    if judged:
        lines += ["", *_semantics(judged)]
    return lines


def _semantics(judged: Sequence[Entry]) -> list[str]:
    told = judged[0]["semantics"]
    lines = [
        f"What a classifier of the tiny world finds in {told['prompts']} videos of {told['frames']} frames: "
        "the share of digits, colours and directions, 12 frames at a time, that are those asked for. "
        "Difference: engine less torch in points (hundredths), with a 95 % bootstrap interval over prompts.",
        "",
        "| engine | score | digit | colour | direction | all right, first 12 frames | last 12 | difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    names = ["score", "digit", "colour", "direction"]
    names += ["all_right_first_frames", "all_right_last_frames"]
    rows = [("float32 torch", told["torch"], "")]
    for entry in judged:
        found = entry["semantics"]
        low, high = found["interval_points"]
        gap = f"{found['difference_points']:+.2f} [{low:+.2f}, {high:+.2f}]"
        rows.append((entry["engine"], found["engine"], gap))
    for name, marks, gap in rows:
        lines.append(f"| {name} | {' | '.join(f'{marks[key]:.3f}' for key in names)} | {gap} |")
    return lines


def _details(entry: Entry) -> list[str]:
    parity, drift = entry["parity"], entry["drift"]
    lines = []
    if parity.get("inaccurate"):
        lines.append(
            f"- **misses its budget, and was allowed to**: {'; '.join(parity['inaccurate'])}"
        )
    if "measured_with" in parity:
        lines.append(f"- measured with: {parity['measured_with']}")
    lines.append(f"- parts: {_named(parity.get('pass', {}))}")
    if parity.get("rollout"):
        lines.append(f"- the gate's rollout: {_named(parity['rollout'])}")
    speed = parity.get("speed")
    if speed:
        lines.append(
            f"- speed where it was built: {speed['times_as_long']:.2f} times as long as {speed['against']} "
            f"({speed['ms_a_pass']:.2f} ms a pass against {speed['its_ms_a_pass']:.2f}, in turns)"
        )
    if entry["layers"]:
        lines += [f"- worst layers: {_worst_layers(entry['layers'])}"]
    if drift and "frames" in drift:
        plan = drift["plan"]
        lines += [
            "",
            f"{drift['blocks']} blocks, {plan['first_steps']} steps, then {plan['steps']}; {drift['videos']} "
            f"videos of {drift['latents'][0]}x{drift['latents'][1]} latents.",
            "",
            "| frame | error | on torch's latents |",
            "|---:|---:|---:|",
        ]
        count = len(drift["frames"])
        shown = sorted({round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)})
        for i in shown:
            cells = _figure(drift["frames"][i]), _figure(drift["frames_fed"][i])
            lines.append(f"| {i + 1} | {' | '.join(cells)} |")
    return lines


def _worst_layers(layers: Sequence[Mapping[str, Any]]) -> str:
    """Those in which most arises; what is no finite number is worst of all."""
    own = [layer for layer in layers if layer["own"] is not None]
    ranked = sorted(own, key=lambda layer: -layer["own"])[:WORST]
    named = [f"{layer['name']} {_figure(layer['own'])}" for layer in ranked]
    broken = [layer["name"] for layer in layers if layer["error"] is None]
    return ", ".join([f"{name} not finite" for name in broken[:WORST]] + named)


def _named(figures: Mapping[str, float | None]) -> str:
    return (
        ", ".join(f"{name} {_figure(value)}" for name, value in figures.items()) or "not measured"
    )


def _worst(figures: Mapping[str, float | None]) -> str:
    known = [value for value in figures.values() if value is not None]
    return "not finite" if len(known) < len(figures) else _figure(max(known, default=None))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value >= 0.1 else f"{value:.1e}"
