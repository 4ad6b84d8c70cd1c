"""A TensorRT-RTX plan, built, inspected and refused on a machine without a card."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
HAS_DRIVER = Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()


@pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="needs the extra [rtx]")
@pytest.mark.skipif(HAS_DRIVER, reason="is about machines without an NVIDIA driver")
def test_plan_without_a_card(
    module: Run, asd_rt: Run, refused: Run, student: Path, out: Path, tmp_path: Path
) -> None:
    target = ("--target", "tensorrt", "--precision", "fp16", "--gpu", "sm89")
    built = module("export.build", "--checkpoint", student, "--steps", "1", *target, "--out", out)
    assert built.code == 0, built.stderr
    plan = out / "asd_fp16.plan"
    assert plan.stat().st_size > 100_000
    seen = asd_rt("inspect", plan, "--json")
    assert seen.code == 0, seen.stderr
    assert b"sm89" in seen.stdout
    videos = tmp_path / "videos"
    videos.mkdir()
    words = ("--engine", plan, "--prompt", "a red three moving right", "--out", videos / "a.mp4")
    refused(asd_rt("run", *words), 1, "NVIDIA", where=videos)
