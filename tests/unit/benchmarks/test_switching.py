"""The arithmetic of the reports on prompt switches and drift, and both commands on few blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import asd_rt
import train
from benchmarks import drift, switching
from benchmarks.judge import shipped_judge
from train.config import load_config
from train.judge import same_axes

TINY = str(Path(asd_rt.__file__).parent / "engine" / "asd_fp32.onnx")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A judge that has hardly learned anything."""
    monkeypatch.setenv("ASD_RT_CACHE", str(tmp_path / "cache"))
    config = load_config(Path(next(iter(train.__path__))) / "configs" / "tiny.toml")
    config = replace(config, classifier=replace(config.classifier, steps=2))
    for module in (switching, drift):
        monkeypatch.setattr(module, "shipped_judge", lambda: shipped_judge(config))


def test_blocks_until_something_shows_twice_in_a_row() -> None:
    shown = np.array(
        [[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=bool
    )
    assert switching.blocks_until(shown).tolist() == [1, 2, 3, np.inf, np.inf]


def test_figures_of_switches() -> None:
    hits = np.zeros((64, 5), bool)
    hits[:48, 1:] = True
    found = switching.figures(hits)
    assert found["median_blocks"] == 2 and found["never"] == 16
    assert [share[0] for share in found["shown_within"].values()] == [0, 0.75, 0.75, 0.75]
    low, high = found["shown_within"][2][1:]
    assert 0.6 < low < 0.75 < high < 0.9
    assert found["right_by_block"] == [0, 0.75, 0.75, 0.75, 0.75]
    assert switching.figures(~hits)["median_blocks"] is None


def test_everything_changes_in_a_switch() -> None:
    old, new = switching.draw_switches(40, seed=3)
    assert (old[:, :2] != new[:, :2]).all()
    assert not same_axes(old[:, 2], new[:, 2]).any()
    again = switching.draw_switches(40, seed=3)
    assert torch.equal(old, again[0]) and torch.equal(new, again[1])


def test_the_command_on_two_switches(hasty: None, tmp_path: Path, capsys) -> None:
    flags = ["--engine", TINY, "--switches", "2", "--at", "2", "--after", "3"]
    assert switching.main([*flags, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "switching.json").read_text())
    assert set(report["rows"]) == {"kept", "recached", "a new video"}
    assert all(len(r["all"]["right_by_block"]) == 3 for r in report["rows"].values())
    assert (tmp_path / "switching.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "switching.png").stat().st_size > 10_000


def test_drift_of_few_blocks(hasty: None, tmp_path: Path, capsys) -> None:
    flags = ["--engine", TINY, "--blocks", "16", "--part", "8", "--videos", "2", "--out"]
    assert drift.main([*flags, str(tmp_path), "--refresh", "0", "3"]) == 0
    report = json.loads((tmp_path / "drift.json").read_text())
    for rows in report["policies"].values():
        assert [row["at"] for row in rows] == [8, 16]
        for row in rows:
            assert row["all"] == pytest.approx(np.mean(row["all_by_video"]), abs=1e-3)
            assert 0 < row["brightness"] < 1 and 0 <= row["bright"] < 1 and row["latent_rms"] > 0
            assert row["ms"] > 0 and row["resident_mb"] > 0
    never, first = (rows[0] for rows in report["policies"].values())
    assert never["latent_rms"] != first["latent_rms"]
    assert (tmp_path / "drift.md").read_text() in capsys.readouterr().out
    for name in ("drift.png", "drift-frames.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert list(report["policies"]) == ["never", "every 3"]
    assert drift.main([*flags, str(tmp_path), "--refresh", "-1"]) == 1
    assert "refresh-every must be" in capsys.readouterr().err
    assert drift.main([*flags, str(tmp_path), "--part", "32"]) == 1
    assert "error: --videos must be" in capsys.readouterr().err
