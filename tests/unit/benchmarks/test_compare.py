"""The comparison: ratios of rounds as pairs, and one short run of the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.compare import main, ratios
from benchmarks.sizes import SIZES, random_checkpoint


def test_ratios_are_of_rounds_not_of_medians() -> None:
    rows = [
        {"name": "theirs", "all_video_ms": [20.0, 40.0, 60.0]},
        {"name": "ours", "all_video_ms": [10.0, 20.0, 10.0]},
    ]
    assert ratios(rows, "ours", "all_video_ms") == {
        "theirs": {"p25": 2.0, "p50": 2.0, "p75": 4.0},
    }


def test_ours_and_eager_make_the_same_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--blocks",
        "5",
        "--rounds",
        "1",
        "--warmup",
        "1",
        "--no-compile",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    (file,) = tmp_path.glob("compare-*.json")
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == {"eager fp32", "eager bf16", "asd-rt fp32", "asd-rt fp32, joined"}
    assert rows["eager fp32"]["error"] == 0
    assert rows["asd-rt fp32"]["error"] < 1e-4
    assert rows["asd-rt fp32, joined"]["error"] < 1e-4
    assert 1e-4 < rows["eager bf16"]["error"] < 0.3
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert "| eager bf16 |" in capsys.readouterr().out


def test_another_checkpoints_engine_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    golden = data / "golden" / "block3_4step"
    assert main(["--checkpoint", str(golden), "--out", str(tmp_path)]) == 1
    assert "was built from checkpoint tiny_student" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["28m"])
def test_sizes_are_what_they_are_called(name: str) -> None:
    weights = random_checkpoint(name).weights
    blocks = sum(weight.numel() for key, weight in weights.items() if key.startswith("blocks."))
    assert abs(blocks / 28e6 - 1) < 0.05
    assert torch.equal(
        weights["head.head.weight"], random_checkpoint(name).weights["head.head.weight"]
    )
    size = SIZES[name]
    tokens = np.prod(size.latent_hw) // 4 * size.cache.block_frames
    assert tokens == 192
