"""What a run's durations amount to: percentiles, jitter, time to first frame, frames a second.

A record is one block's durations: {"block", "steps", "denoise_ms", "cache_ms", "decode_ms", "block_ms",
"frames"}. `cache_ms` and `decode_ms` are None where that did not happen; `block_ms` is the whole block,
cache pass and decoding included; `frames` are of video, or latent ones where nothing decodes. Several runs
follow one another in one list: block 0 begins a run. A record may have more: `pass_ms`, each pass; `joined`,
whether the first of them was also the cache pass of the block before; `hidden_ms`, how much of the cache pass
ran while the block was decoded (`block_ms` is without it); and where there was a deadline,
`missed` and `slack_ms`, which is negative when the block came late.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from asd_rt import machine

Record = Mapping[str, Any]
PACKAGES = (
    "asd-rt",
    "numpy",
    "av",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt-rtx",
    "cuda-python",
)
_ROWS = (
    ("first block (FFE)", "first_block_ms"),
    ("later blocks", "block_ms"),
    ("denoising pass", "pass_ms"),
    ("cache pass", "cache_ms"),
    ("joined pass", "joined_ms"),
    ("decode", "decode_ms"),
    ("time to first frame", "first_frame_ms"),
)
_BARE_ROWS = (
    ("first block (FFE), without decode", "first_block_ms"),
    ("later blocks, without decode", "block_ms"),
    ("time to first frame, without decode", "first_frame_ms"),
)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Count, mean, p50, p95, p99, max and jitter (standard deviation) of durations in ms.

    Empty where there are no values.
    """
    ms = np.fromiter(values, dtype=np.float64)
    if not len(ms):
        return {}
    p50, p95, p99 = np.percentile(ms, [50, 95, 99])
    figures = {"mean": ms.mean(), "p50": p50, "p95": p95, "p99": p99}
    figures |= {"max": ms.max(), "jitter": ms.std()}
    return {"count": len(ms), **{name: round(float(v), 3) for name, v in figures.items()}}


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Figures of one or several runs of one plan.

    Args:
        records: see the head of this module; warm-up runs left out.

    Returns:
        `runs` and `steps_per_block`; as `spread`: `first_block_ms`, `block_ms` (`later_blocks`),
        `pass_ms` (one denoising pass), `cache_ms`, `joined_ms` (both in one), `decode_ms`, `first_frame_ms`
        (denoising and decoding of the first block; its cache pass comes later); `without_decode`, with the
        same of `first_block_ms`, `block_ms` and `first_frame_ms` less decoding; `fps` with `sustained`
        (`later_blocks`) and `whole_video`, each {"with_decode", "without_decode"}, None where that is not
        known; `misses`, {"with_decode", "without_decode"}, each {"count", "share"} of all blocks or None,
        and None where there was no deadline; `peak_memory_bytes`. Of a video without later blocks the whole
        counts as sustained.
    """
    first = [r for r in records if r["block"] == 0]
    later = later_blocks(records)
    return {
        "runs": len(first),
        "steps_per_block": [r["steps"] for r in _first_run(records)],
        "first_block_ms": spread(r["block_ms"] for r in first),
        "block_ms": spread(r["block_ms"] for r in later),
        "pass_ms": spread(ms for r in records for ms in _single_passes(r)),
        "cache_ms": spread(r["cache_ms"] for r in records if r["cache_ms"] is not None),
        "joined_ms": spread(r["pass_ms"][0] for r in records if r.get("joined")),
        "decode_ms": spread(r["decode_ms"] for r in records if r["decode_ms"] is not None),
        "first_frame_ms": spread(r["denoise_ms"] + (r["decode_ms"] or 0.0) for r in first),
        "without_decode": {
            "first_block_ms": spread(_bare_ms(r) for r in first),
            "block_ms": spread(_bare_ms(r) for r in later),
            "first_frame_ms": spread(r["denoise_ms"] for r in first),
        },
        "fps": {"sustained": _fps(later or records), "whole_video": _fps(records)},
        "misses": misses(records),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def later_blocks(records: Sequence[Record]) -> list[Record]:
    """Blocks in the steady state: after the first, and with a cache pass of their own or joined.

    Where passes are not joined, a video's last block has none.
    """
    after_first = [r for r in records if r["block"] != 0]
    whole = [r for r in after_first if r["cache_ms"] is not None or r.get("joined")]
    return whole or after_first


def misses(records: Sequence[Record]) -> dict[str, Any] | None:
    """Late blocks among those that had a deadline; see `summarise`."""
    timed = [r for r in records if r.get("missed") is not None]
    if not timed:
        return None
    decoded = any(r["decode_ms"] is not None for r in timed)
    bare = sum(r["slack_ms"] + (r["decode_ms"] or 0.0) < 0 for r in timed)
    return {
        "with_decode": _count(sum(r["missed"] for r in timed), timed) if decoded else None,
        "without_decode": _count(bare, timed),
    }


def _count(late: int, timed: Sequence[Record]) -> dict[str, float]:
    return {"count": late, "share": round(late / len(timed), 4)}


def _bare_ms(record: Record) -> float:
    whole: float = record["block_ms"]
    hidden: float = record.get("hidden_ms", 0.0)  # without decoding there is nothing to hide behind
    return whole - (record["decode_ms"] or 0.0) + hidden


def _single_passes(record: Record) -> Sequence[float]:
    """Durations of a block's denoising passes that are not joined with a cache pass."""
    if "pass_ms" not in record:
        return [record["denoise_ms"] / record["steps"]] * record["steps"]
    passes: Sequence[float] = record["pass_ms"]
    return passes[1:] if record.get("joined") else passes


def _first_run(records: Sequence[Record]) -> Sequence[Record]:
    starts = [i for i, r in enumerate(records) if r["block"] == 0]
    return records[: starts[1]] if len(starts) > 1 else records


def _fps(records: Sequence[Record]) -> dict[str, float | None]:
    """Frames a second of `records`, with decoding and without."""
    frames = sum(r.get("frames") or 0 for r in records)
    whole_ms = sum(r["block_ms"] for r in records)
    bare_ms = sum(_bare_ms(r) for r in records)
    decoded = any(r["decode_ms"] is not None for r in records)
    return {
        "with_decode": round(1e3 * frames / whole_ms, 2) if frames and decoded else None,
        "without_decode": round(1e3 * frames / bare_ms, 2) if frames and bare_ms > 0 else None,
    }


def markdown_table(summary: Mapping[str, Any]) -> str:
    """`summary` of `summarise` as Markdown: durations, then speed and memory."""
    lines = [
        "| ms | p50 | p95 | p99 | mean | jitter | n |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, key in _ROWS:
        lines += _row(label, summary[key])
    if summary["decode_ms"]:
        for label, key in _BARE_ROWS:
            lines += _row(label, summary["without_decode"][key])
    lines += ["", "| frames a second | with decode | without decode |", "|---|---:|---:|"]
    for label, key in (("sustained", "sustained"), ("whole video", "whole_video")):
        values = summary["fps"][key]
        cells = " | ".join(
            "-" if values[k] is None else f"{values[k]:.1f}"
            for k in ("with_decode", "without_decode")
        )
        lines.append(f"| {label} | {cells} |")
    if late := summary["misses"]:
        each = [
            f"{found['count']} ({found['share']:.1%}) {key.replace('_', ' ')}"
            for key, found in late.items()
            if found
        ]
        lines += ["", f"Blocks that came late: {', '.join(each)}."]
    lines += ["", f"Peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB."]
    return "\n".join(lines) + "\n"


def _row(label: str, stats: Mapping[str, float]) -> list[str]:
    """A line of the table; none where nothing was measured."""
    if not stats:
        return []
    cells = " | ".join(f"{stats[k]:.2f}" for k in ("p50", "p95", "p99", "mean", "jitter"))
    return [f"| {label} | {cells} | {stats['count']} |"]


def peak_memory_bytes() -> int:
    """Largest resident memory of this process until now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def versions() -> dict[str, str]:
    """Python's and the packages' versions that matter to speed, of those installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """Processor, cores, instruction sets, memory, system and load of this machine."""
    return {
        "cpu": machine.cpu_model() or platform.processor() or platform.machine(),
        "cores": machine.usable_cores(),
        "instruction_sets": machine.instruction_sets(),
        "memory_bytes": machine.total_memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
