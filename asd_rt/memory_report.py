"""What an engine needs of memory, for people and for programs: one plan for each precision it could have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asd_rt.machine import available_memory_bytes
from asd_rt.planner import Video, plan_memory

CHOICES = (("fp32", "onnx"), ("bf16", "onnx"), ("int8", "onnx"), ("fp16", "tensorrt"))
ROWS = {
    "weights": "weights",
    "mapped": "weights seen through their file",
    "cache": "KV cache",
    "prompt": "prompt",
    "state": "decoder state",
    "activations": "activations",
    "program": "program",
}


def memory_report(video: Video) -> dict[str, Any]:
    """The settings of `video`, and what it needs in every precision, in bytes.

    `needed_bytes` is what must be available, `total_bytes` the peak of resident memory; `fits` says whether
    this machine has it now, and is None for cards.
    """
    available = available_memory_bytes()
    plans = {}
    # As it is built, where it is built: an int8 engine may be a plan too.
    choices = dict(CHOICES) | {video.precision: video.backend}
    for precision, backend in choices.items():
        plan = plan_memory(replace(video, precision=precision, backend=backend))
        on_card = backend != "onnx"
        plans[precision] = {
            **plan.to_json(),
            "total_bytes": plan.total,
            "needed_bytes": plan.needed,
            "fits": None if on_card or available is None else plan.needed <= available,
        }
    return {
        "latent_hw": list(video.latent_hw),
        "frames": video.frames,
        "window_frames": video.cache.window_frames,
        "block_frames": video.cache.block_frames,
        "precision": video.precision,
        "available_bytes": available,
        "plans": plans,
    }


def memory_text(report: dict[str, Any]) -> str:
    """The report as a table, GB in columns by precision."""
    (h, w), window = report["latent_hw"], report["window_frames"]
    held = f"a window of {window} frames" if window else "no window"
    lines = [f"memory in GB for {report['frames']} frames of {h}x{w} latents, {held}"]
    plans = report["plans"]
    names = [f"{name}*" if name == report["precision"] else name for name in plans]
    width = max(map(len, ROWS.values())) + 2
    lines.append(" " * width + "".join(f"{name:>9}" for name in names))
    for key, label in (*ROWS.items(), ("total_bytes", "all")):
        figures = "".join(f"{plan[key] / 1e9:9.2f}" for plan in plans.values())
        lines.append(f"{label:<{width}}{figures}")
    verdict = {True: "fits", False: "too much", None: "a card's"}
    lines.append(f"{'here':<{width}}" + "".join(f"{verdict[p['fits']]:>9}" for p in plans.values()))
    if report["available_bytes"] is not None:
        lines.append(f"{report['available_bytes'] / 1e9:.1f} GB are available; * as built")
    return "\n".join(lines)
