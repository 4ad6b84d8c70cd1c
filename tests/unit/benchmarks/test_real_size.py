"""The benchmark at real size: what it measures of a stage, and what it says of errors."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from asd_rt.errors import EngineError
from benchmarks.real_size import WAN, compare, main, markdown, stage, write_checkpoint
from train.checkpoint import load_checkpoint


def test_a_stage_is_measured_by_itself() -> None:
    size = 700 << 20
    found = stage("allocate", ["-c", f"x = bytearray({size}); x[::4096] = x[::4096]"])
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a child begins as its parent
    assert size < found["peak_bytes"] < max(size, own) + (100 << 20)
    assert found["seconds"] > 0
    with pytest.raises(EngineError, match="fail failed"):
        stage("fail", ["-c", "raise SystemExit(3)"])


def test_errors_are_those_from_float32(tmp_path: Path) -> None:
    exact = np.ones((1, 3, 16, 2, 2), np.float32)
    save_file({"latents": exact * 1.01}, tmp_path / "replay-bf16.safetensors")
    theirs = {"eager-fp32": exact, "eager-bf16": exact * 1.02}
    save_file(theirs, tmp_path / "torch-bf16.safetensors")
    found = compare(tmp_path, "bf16", WAN)
    assert found["error"] == pytest.approx(0.01, rel=1e-3)
    assert found["error_of_torch_bf16"] == pytest.approx(0.02, rel=1e-3)
    row = {"seconds": 1, "cpu_seconds": 1, "peak_bytes": 8.4e9, "command": "python"}
    report = {"layers": 30, "stages": [{**row, "stage": "replay bf16"}], "results": [found],
              "machine": {"cpu": "none", "cores": 1, "load_average": [0]}, "command": "c"}  # fmt: skip
    assert "| bf16 | 60x104 | 1.0e-02 | 2.0e-02 | 8.26 | 8.40 |" in markdown(report)


def test_unknown_engines_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--only", "fp8"]) == 1
    assert "choose of bf16, fp32, plan" in capsys.readouterr().err


def test_checkpoint_is_one_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(WAN, dim=48, ffn_dim=8, text_dim=8, num_heads=4)
    monkeypatch.setattr("benchmarks.real_size.WAN", small)
    write_checkpoint(tmp_path / "checkpoint", layers=1)
    found = load_checkpoint(tmp_path / "checkpoint").config
    assert (found.num_layers, found.dim) == (1, 48)
