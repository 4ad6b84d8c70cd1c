"""Passes shared by several videos: the right shapes, the right results, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import batching
from train.checkpoint import Checkpoint, load_checkpoint


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


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny student's first layer alone, whose exports take seconds."""

    def load(path: Path) -> Checkpoint:
        found = load_checkpoint(path)
        weights = {
            name: value
            for name, value in found.weights.items()
            if not name.startswith("blocks.") or name.startswith("blocks.0.")
        }
        return replace(found, config=replace(found.config, num_layers=1), weights=weights)

    monkeypatch.setattr(batching, "load_checkpoint", load)


def test_the_command_on_two_videos(
    shallow: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batching.main(["--videos", "2", "--rounds", "3", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "batching.json").read_text())
    (row,) = report["rows"]
    assert row["videos"] == 2
    assert row["error"] < 1e-5, "each video gets what it gets alone"
    for way in batching.WAYS:
        gain = row[way]["gain"]
        assert 0 < gain["low"] <= gain["value"] <= gain["high"]
        assert row[way]["ms"] > 0
    assert row[batching.TURNS]["gain"]["value"] == 1
    assert (tmp_path / "batching.md").read_text() in capsys.readouterr().out
    assert batching.main(["--videos", "1", "--out", str(tmp_path)]) == 1
    assert "--videos must be at least 2" in capsys.readouterr().err
