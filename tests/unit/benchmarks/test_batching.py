"""Passes shared by several videos: the right shapes, the right results, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import batching


def test_all_but_the_modulation_has_a_row_for_each_video() -> None:
    part = batching.PartModule(
        torch.nn.Identity(),
        {
            "latents": (torch.float32, (1, "F", 4, 8, 8)),
            "modulation": (torch.float32, (14, 32)),
            "rope_cos": (torch.float32, ("T", 8)),
            "past_k.0": (torch.float32, (1, "P", 32)),
        },
        {"flow": (torch.float32, (1, "F", 4, 8, 8))},
    )
    found = batching.shared(part, 3)
    assert {name: shape for name, (_, shape) in found.inputs.items()} == {
        "latents": (3, "F", 4, 8, 8),
        "modulation": (14, 32),
        "rope_cos": (3, "T", 8),
        "past_k.0": (3, "P", 32),
    }
    assert found.outputs["flow"][1] == (3, "F", 4, 8, 8)


def test_the_command_on_two_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batching.main(["--videos", "2", "--rounds", "3", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "batching.json").read_text())
    (row,) = report["rows"]
    assert row["videos"] == 2
    assert 0 < row["error"] < 1e-5, "other additions, the same results"
    assert row["gain_low"] <= row["gain"] <= row["gain_high"]
    assert np.isclose(row["gain"], row["single_ms"] / row["shared_ms"], rtol=0.9)
    assert (tmp_path / "batching.md").read_text() in capsys.readouterr().out
    assert batching.main(["--videos", "1", "--out", str(tmp_path)]) == 1
    assert "--videos must be at least 2" in capsys.readouterr().err
