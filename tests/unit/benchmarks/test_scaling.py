"""Scaling: the long video is measured after its window is full; a short run of the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scaling import main


def test_a_long_video_on_the_packaged_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--axis", "blocks,batch", "--blocks", "40", "--out", str(tmp_path)]) == 0
    blocks = json.loads((tmp_path / "scaling-blocks.json").read_text())
    assert len(blocks["rows"]) == 20
    assert blocks["rows"][0]["at"] == 7  # window 12, blocks of 3: full with the fifth, two a part
    assert all(row["young_ms"] > 0 for row in blocks["rows"])
    assert blocks["slope_error"] > 0
    assert blocks["rows"][-1]["at"] == 40
    batch = json.loads((tmp_path / "scaling-batch.json").read_text())
    assert [row["at"] for row in batch["rows"]] == [1, 2, 4]
    assert "Change of the time of a block" in capsys.readouterr().out
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_an_unknown_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--axis", "colour", "--out", str(tmp_path)]) == 1
    assert "--axis colour: choose of blocks" in capsys.readouterr().err
