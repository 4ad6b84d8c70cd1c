"""`python -m train.evaluate`: engines and checkpoints side by side, on the same prompts and noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from asd_rt.engines import PACKAGED_DIR
from asd_rt.errors import CheckpointError
from asd_rt.plan import FixedPlan
from tests.unit.train.toy import toy_start, toy_toml
from train import evaluate
from train.evaluation import make_plans, plan_name
from train.samplers import EngineSubject, open_subject, open_teacher
from train.tiny_world import random_labels
from train.x0_similarity import SHIPPED

ENGINE = PACKAGED_DIR / "asd_fp32.onnx"
LABELS = random_labels(3, torch.Generator().manual_seed(0))


def test_an_engine_shows_what_its_checkpoint_does() -> None:
    """Text part, noise, plan, loop and decoder are all the runtime's on one side, torch's on the other."""
    student, engine = open_subject(SHIPPED), open_subject(ENGINE, 1)
    assert isinstance(engine, EngineSubject)
    for plan in (FixedPlan(1, 4), FixedPlan(2, 2)):
        expected = student.sample(LABELS, 9, plan, 7)
        found = engine.sample(LABELS, 9, plan, 7)
        assert found.shape == expected.shape == (3, 9, 3, 32, 32)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
        assert (student.sample(LABELS, 9, plan, 8) - expected).abs().max() > 0.1
    engine.close()


def test_a_teacher_begins_with_the_students_noise(tmp_path: Path) -> None:
    toml = toy_toml(tmp_path)
    folder, init = toy_start(tmp_path, toml)
    teacher, student = open_teacher(folder, 2, 3.0), open_subject(init)
    seen = {}

    def watch(name: str, subject) -> None:
        def spy(x, *rest):
            seen.setdefault(name, x[: len(LABELS)].clone())
            return inner(x, *rest)

        inner = subject.model.denoise
        subject.model.denoise = spy

    watch("teacher", teacher)
    watch("student", student)
    plan = FixedPlan(1, 1)
    assert teacher.sample(LABELS, 6, plan, 5).shape == (3, 6, 3, 32, 32)
    student.sample(LABELS, 6, plan, 5)
    torch.testing.assert_close(seen["teacher"][:, :3], seen["student"])


def test_plans_are_those_asked_for_once() -> None:
    plans = make_plans([1, 2, 4], [None, 4])
    assert [plan_name(plan) for plan in plans] == [
        "1 step", "1* step", "2 steps", "2* steps", "4 steps",
    ]  # fmt: skip
    assert make_plans([3], [2]) == []


def test_the_command_judges_an_engine_beside_its_checkpoint(tmp_path: Path, capsys) -> None:
    toml, out = toy_toml(tmp_path), tmp_path / "out"
    teacher, _ = toy_start(tmp_path, toml)
    flags = ["--config", str(toml), "--clips", "4", "--steps", "1", "--later", "--sheets"]
    flags += ["--teacher", str(teacher), "--teacher-steps", "2"]
    assert evaluate.main([str(SHIPPED), str(ENGINE), *flags, "--out", str(out)]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    rows = report["rows"]
    assert [(row["steps"], row["first_steps"], row["frames"]) for row in rows] == [
        (None, None, [1, 6]),
        (None, None, [19, 24]),
        (None, None, [1, 6]),  # the teacher
        *[(1, first, frames) for frames in ([1, 6], [19, 24]) for first in (1, 4)] * 2,
    ]
    for student, engine in zip(rows[3:7], rows[7:], strict=True):
        for name, (value, low, high) in engine["figures"].items():
            assert low <= high
            assert value == pytest.approx(student["figures"][name][0], rel=0.02, abs=0.5)
    shown = capsys.readouterr().out
    assert shown.strip() in (out / "evaluation.md").read_text()
    assert {p.name for p in out.glob("*.png")} == {
        "teacher.png", "1-tiny_student.png", "2-asd_fp32.onnx.png",
    }  # fmt: skip
    assert not list(out.glob(".*"))  # nothing half-written is left


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to judge"),
        (["nowhere"], "nowhere: no such checkpoint or engine"),
        ([str(SHIPPED), "--clips", "1"], "--clips must be a whole number >= 2, found 1"),
        ([str(SHIPPED), "--steps", "5"], "steps must be"),
        ([str(SHIPPED), "--steps", "4", "--first-steps", "2"], "no plan gives the first block"),
        ([str(SHIPPED), "--frames", "7"], "a multiple of the 3 frames of a block"),
        ([str(SHIPPED), "--config", "none.toml"], "none.toml: no such file"),
    ],
)
def test_bad_arguments_are_one_line(flags: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert evaluate.main([*flags, "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_another_world_is_refused(tmp_path: Path) -> None:
    toml = toy_toml(tmp_path)
    folder, _ = toy_start(tmp_path, toml)
    (folder / "codec.safetensors").unlink()
    with pytest.raises(CheckpointError, match="makes no videos of the tiny world"):
        open_subject(folder)


def test_clips_are_drawn_in_batches_of_their_own_noise(tmp_path: Path) -> None:
    """The seed of a batch is its number's, so that equal prompts in two batches differ."""
    from train import samplers

    toml = toy_toml(tmp_path)
    _, init = toy_start(tmp_path, toml)
    student = open_subject(init)
    labels = LABELS[:1].repeat(samplers.BATCH + 1, 1)
    clips = samplers.sample_all(student, labels, 6, FixedPlan(1, 1), 3, "clips", keep=3)
    assert clips.shape[:2] == (samplers.BATCH + 1, 3)
    again = student.sample(labels[:1], 6, FixedPlan(1, 1), 4)[:, -3:]
    np.testing.assert_allclose(clips[-1:], again, atol=1e-6)
