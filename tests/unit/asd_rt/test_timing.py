"""Summaries of durations."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asd_rt.timing import (
    describe_machine,
    markdown_table,
    peak_memory_bytes,
    spread,
    summarise,
    versions,
)


def record(
    block: int, steps: int, last: bool = False, decode: float | None = 2.0
) -> dict[str, Any]:
    cache = None if last else 3.0
    whole = 4.0 * steps + (cache or 0.0) + (decode or 0.0)
    return {
        "block": block,
        "steps": steps,
        "denoise_ms": 4.0 * steps,
        "cache_ms": cache,
        "decode_ms": decode,
        "block_ms": whole,
        "frames": 3,
    }


RUN = [record(0, 4), record(1, 1), record(2, 1, last=True)]


def test_spread() -> None:
    stats = spread(range(1, 101))
    assert stats["count"] == 100
    assert stats["p50"] == 50.5
    assert stats["p95"] == pytest.approx(95.05)
    assert stats["p99"] == pytest.approx(99.01)
    assert stats["max"] == 100
    assert stats["jitter"] == pytest.approx(28.866, abs=1e-3)
    assert spread([]) == {}
    assert spread([7.0])["jitter"] == 0


def test_summary_parts_first_block_from_later_ones() -> None:
    summary = summarise(RUN * 5)
    assert summary["runs"] == 5
    assert summary["steps_per_block"] == [4, 1, 1]
    assert summary["first_block_ms"]["p50"] == 21
    assert summary["block_ms"]["mean"] == 9  # the last block, without a cache pass, is not typical
    assert summary["pass_ms"]["p99"] == 4
    assert summary["cache_ms"]["count"] == 10
    assert summary["decode_ms"]["p50"] == 2
    assert summary["first_frame_ms"]["p50"] == 18
    sustained = summary["fps"]["sustained"]
    assert sustained["with_decode"] == pytest.approx(1000 * 3 / 9, abs=0.01)
    assert sustained["without_decode"] == pytest.approx(1000 * 3 / 7, abs=0.01)
    assert summary["fps"]["whole_video"]["with_decode"] == pytest.approx(1000 * 9 / 36)
    assert 1e6 < summary["peak_memory_bytes"] <= peak_memory_bytes()
    json.dumps(summary)


def test_one_block_and_no_decoder() -> None:
    one = summarise([record(0, 2)])
    assert one["block_ms"] == {}
    assert one["fps"]["sustained"] == one["fps"]["whole_video"]
    bare = summarise([record(0, 4, decode=None), record(1, 1, decode=None)])
    assert bare["decode_ms"] == {}
    assert bare["fps"]["sustained"] == {"with_decode": None, "without_decode": 428.57}
    assert "| decode |" not in markdown_table(bare)
    assert "| sustained | - | 428.6 |" in markdown_table(bare)


def test_with_and_without_decode() -> None:
    summary = summarise(RUN * 5)
    bare = summary["without_decode"]
    assert bare["first_block_ms"]["p95"] == 19
    assert (bare["block_ms"]["p99"], bare["block_ms"]["jitter"]) == (7, 0)
    assert bare["first_frame_ms"]["p50"] == 16
    table = markdown_table(summary)
    assert "| later blocks, without decode | 7.00 | 7.00 | 7.00 | 7.00 | 0.00 | 5 |" in table
    assert "without decode |" not in markdown_table(summarise([record(0, 4, decode=None)])).replace(
        "with decode | without decode |", ""
    )


def test_joined_passes_stand_apart() -> None:
    joined = {"joined": True, "cache_ms": None}
    first = record(0, 4) | {"cache_ms": None, "pass_ms": [4.0] * 4, "joined": False}
    later = record(1, 2) | joined | {"pass_ms": [7.0, 4.0], "denoise_ms": 11.0, "block_ms": 13.0}
    summary = summarise([first, later, later | {"block": 2}])
    assert (summary["pass_ms"]["count"], summary["pass_ms"]["max"]) == (6, 4)
    assert (summary["joined_ms"]["count"], summary["joined_ms"]["p50"]) == (2, 7)
    assert (summary["block_ms"]["count"], summary["block_ms"]["p50"]) == (2, 13)
    assert summary["cache_ms"] == {}
    assert "| joined pass | 7.00 |" in markdown_table(summary)


def test_misses() -> None:
    assert summarise(RUN)["misses"] is None
    assert "came late" not in markdown_table(summarise(RUN))
    slacks = [5.0, -1.0, -3.0, 0.0]  # decoding takes 2
    records = [
        record(block, 1) | {"slack_ms": slack, "missed": slack < 0}
        for block, slack in enumerate(slacks)
    ]
    misses = summarise(records)["misses"]
    assert misses == {
        "with_decode": {"count": 2, "share": 0.5},
        "without_decode": {"count": 1, "share": 0.25},
    }
    table = markdown_table(summarise(records))
    assert "Blocks that came late: 2 (50.0%) with decode, 1 (25.0%) without decode." in table
    bare = [r | {"decode_ms": None} for r in records]
    assert summarise(bare)["misses"] == {
        "with_decode": None,
        "without_decode": {"count": 2, "share": 0.5},
    }


def test_table() -> None:
    table = markdown_table(summarise(RUN))
    assert "| first block (FFE) | 21.00 | 21.00 | 21.00 | 21.00 | 0.00 | 1 |" in table
    assert "| sustained | 333.3 | 428.6 |" in table
    assert table.endswith(" MiB.\n")


def test_environment() -> None:
    assert {"python", "numpy", "av"} <= set(versions())
    machine = describe_machine()
    assert machine["cpu"] and machine["cores"] >= 1
    json.dumps(machine)
