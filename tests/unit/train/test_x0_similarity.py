"""Similarity of x0 from step to step: right where it is known, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.train.toy import toy_start, toy_toml
from train import x0_similarity
from train.samplers import open_subject
from train.tiny_world import random_labels


def test_predictions_of_consecutive_steps_are_compared(tmp_path: Path) -> None:
    _, init = toy_start(tmp_path, toy_toml(tmp_path))
    student = open_subject(init)
    labels = random_labels(2, torch.Generator().manual_seed(0))
    found = x0_similarity.step_similarity(student, labels, 3, 0)
    assert found.shape == (2, 3, 3)
    assert (np.abs(found) <= 1).all() and found.std() > 0
    np.testing.assert_array_equal(found, x0_similarity.step_similarity(student, labels, 3, 0))
    sure = torch.randn(1, 3, 8, 8, 8, generator=torch.Generator().manual_seed(1))

    def denoise(x, time, prompt, rope, past=None, mask=None):
        """Predicts the same x0 whatever the noise."""
        level = levels.pop(0)
        flow = (x - sure) / level if level else torch.zeros_like(x)
        return flow, []

    steps = [step.sigma for step in student.schedule.steps(4)]
    levels = [*steps, 0.0] * 3
    student.model.denoise = denoise
    np.testing.assert_allclose(x0_similarity.step_similarity(student, labels, 3, 0), 1, atol=1e-5)


def test_intervals_hold_the_mean() -> None:
    similarity = np.random.default_rng(0).uniform(0.5, 1, (200, 4, 3))
    report = {
        name: np.array(values) for name, values in x0_similarity.summarise(similarity).items()
    }
    assert report["mean"].shape == (4, 3)
    assert (report["low"] < report["mean"]).all() and (report["mean"] < report["high"]).all()
    width = 4 * similarity.std() / np.sqrt(200)
    np.testing.assert_allclose(report["high"] - report["low"], width, rtol=0.3)


def test_the_command_writes_picture_and_figures(tmp_path: Path, capsys) -> None:
    _, init = toy_start(tmp_path, toy_toml(tmp_path))
    out = tmp_path / "x0.png"
    assert x0_similarity.main([str(init), "--clips", "3", "--blocks", "2", "--out", str(out)]) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    report = json.loads((tmp_path / "x0.json").read_text())
    assert report["clips"] == 3 and len(report["mean"]) == 2
    assert f"block 2: {report['mean'][1][0]:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clips", "1"], "--clips must be >= 2"),
        (["nowhere"], "no such folder or file"),
    ],
)
def test_bad_arguments_are_one_line(flags: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert x0_similarity.main([*flags, "--out", str(tmp_path / "x.png")]) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
