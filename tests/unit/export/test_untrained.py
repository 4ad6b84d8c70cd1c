"""What a student was not trained for is said where it is asked for, never found out as a shape error."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import asd_rt
from asd_rt.errors import EngineError
from asd_rt.manifest import read_manifest, write_manifest
from asd_rt.plan import FixedPlan
from export.build import main
from export.settings import Overrides, make_manifest, resolve
from train.checkpoint import Checkpoint, describe_checkpoint


@pytest.fixture
def checkpoint(student: Path, tmp_path: Path) -> Checkpoint:
    """`student`, which is for blocks of 2 and a window of 6, and says that it was trained on 8 frames."""
    folder = tmp_path / "student"
    shutil.copytree(student, folder)
    told = json.loads((folder / "deployment.json").read_text())
    (folder / "deployment.json").write_text(json.dumps(told | {"trained_frames": 8}))
    return describe_checkpoint(folder)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (Overrides(), ""),
        (Overrides(window_frames=4), ""),
        (Overrides(block_frames=1), "is for blocks of 2 frames"),
        (Overrides(window_frames=8), "never saw more than 6 frames"),
        (Overrides(window_frames=0, sink_frames=0), "never saw more than 6 frames"),
    ],
)
def test_a_build_warns(
    checkpoint: Checkpoint, flags: Overrides, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        resolve(checkpoint, flags, FixedPlan(1, 1))
    assert told in caplog.text
    assert len(caplog.records) == bool(told)


def test_a_video_longer_than_training_is_warned_about(
    checkpoint: Checkpoint, built: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(built, tmp_path / "engines")
    path = tmp_path / "engines" / "asd_fp32.onnx"
    manifest = read_manifest(path)
    settings = resolve(checkpoint, Overrides(), FixedPlan(1, 1))
    told = make_manifest(checkpoint, settings, "fp32", "onnx", manifest.parts).checkpoint
    assert told["trained_frames"] == 8
    write_manifest(path, replace(manifest, checkpoint=told))
    with asd_rt.open(path) as session, caplog.at_level(logging.WARNING):
        session.generate("red", frames=8)
        assert not caplog.records
        session.generate("red", frames=9)
        assert "10 latent frames, but its student was trained on 8" in caplog.text
    with pytest.raises(EngineError, match="trained_frames is a whole number"):
        replace(manifest, checkpoint={"trained_frames": "8"})


def test_dry_run_plans_without_building(
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ["--checkpoint", str(student), "--out", str(tmp_path), "--target", "onnx", "--dry-run"]
    assert main([*words, "--frames", "12", "--precision", "bf16"]) == 0
    report = json.loads(capsys.readouterr().out)["memory"]
    assert (report["frames"], report["precision"], report["latent_hw"]) == (12, "bf16", [4, 2])
    assert report["plans"]["fp32"]["cache"] == 2 * 6 * 2 * 32 * 4  # keys and values of a window
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--frames", "0"]) == 1
    assert "--frames must be a whole number >= 1, found 0" in capsys.readouterr().err
    with caplog.at_level(logging.INFO):
        assert main([*words, "--vae", "vae", "--text-encoder", "umt5"]) == 0
    assert "not counted: --vae, --text-encoder" in caplog.messages
