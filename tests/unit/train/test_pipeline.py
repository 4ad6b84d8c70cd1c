"""The whole recipe at toy size, and its second half from what the first handed on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asd_rt.errors import ConfigError
from asd_rt.plan import FixedPlan
from tests.unit.train.toy import toy_toml
from train.__main__ import main
from train.checkpoint import load_checkpoint
from train.config import load_config
from train.evaluation import Evaluation, Row
from train.kept_rows import KeptRows
from train.pipeline import World
from train.scores import Scores


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_toml(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    assert main(["--config", str(toml), "--out", str(out), "--threads", "1"]) == 0
    return out


def test_a_run_ends_with_a_scored_student(whole: Path) -> None:
    student = load_checkpoint(whole / "student")
    assert student.deployment.words and student.codec is not None
    rows = json.loads((whole / "scores.json").read_text())["rows"]
    assert [row["name"] for row in rows[:5]] == [
        "real, held-out glyphs", "real, held-out glyphs", "teacher, 30 steps", "causal start",
        "causal start",
    ]  # fmt: skip
    plans = [(row["steps"], row["first_steps"]) for row in rows[5:]]
    assert plans == [(4, 4), (3, 3), (3, 4), (2, 2), (2, 4), (1, 1), (1, 4), (1, 4)]
    card = (whole / "student" / "README.md").read_text()
    assert "| student, 1* step (4) |" in card and "frames 19-24" in card
    records = [json.loads(line) for line in (whole / "curve.jsonl").read_text().splitlines()]
    looks = [r["step"] for r in records if "held_out" in r]
    assert looks == [1, 3]  # of the distillation, every second step
    assert not list(whole.glob(".*"))


def test_starting_from_what_was_handed_on_is_the_same_run(
    whole: Path, toml: Path, tmp_path: Path
) -> None:
    given = ["--teacher", str(whole / "teacher"), "--init", str(whole / "init")]
    flags = ["--config", str(toml), "--out", str(tmp_path), "--threads", "1", *given]
    assert main([*flags, "--stages", "teacher,init,distill"]) == 0
    assert not (tmp_path / "teacher.pt").exists() and not (tmp_path / "init.pt").exists()
    config = load_config(toml)
    folders = {name: whole / name for name in ("teacher", "init")}
    found = World(config, tmp_path, 0, folders).averaged("distill")
    expected = World(config, whole, 0).averaged("distill")
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    with pytest.raises(ConfigError, match="another configuration or seed"):
        World(config, tmp_path, 0).averaged("distill")  # a run of its own, with these networks


def test_a_run_from_before_hands_on_when_asked(whole: Path, toml: Path) -> None:
    """Folders that are missing are written from the stages' own files."""
    world = World(load_config(toml), whole, 0)
    before = {
        name: (whole / name / "model.safetensors").read_bytes() for name in ("teacher", "init")
    }
    for name in before:
        (whole / name / "stage.json").unlink()
        (whole / name).rename(whole / f"{name}.away")
    try:
        for name, weights in before.items():
            assert world.handed(name).origin["stage"] == name
            assert (whole / name / "model.safetensors").read_bytes() == weights
    finally:
        for name in before:
            for path in (whole / f"{name}.away").iterdir():
                path.unlink()
            (whole / f"{name}.away").rmdir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", str(2**32)], "--seed must be a whole number from 0 to 4294967295"),
        (["--init", "x"], "--init needs the --teacher"),
        (["--save-every", "-1"], "--save-every must be"),
        (["--teacher", "nowhere"], "nowhere: no such checkpoint"),
        (["--stages", "distill"], "teacher.pt: missing; run the stage teacher first"),
    ],
)
def test_bad_arguments_are_one_line(
    flags: list[str], message: str, toml: Path, tmp_path: Path, capsys
) -> None:
    assert main(["--config", str(toml), "--out", str(tmp_path / "out"), *flags]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1 and message in told[0]


def test_scoring_goes_on_where_it_was_interrupted(
    whole: Path, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption only what is missing is judged, and a finished run judges nothing."""
    flags = ["--config", str(toml), "--out", str(whole), "--threads", "1", "--resume"]
    before = (whole / "scores.json").read_text()
    (whole / "rows.json").unlink()
    judged: list[str] = []
    subject = Evaluation.subject

    def judge(self: Evaluation, *args: Any) -> Any:
        if len(judged) == 4:
            raise KeyboardInterrupt
        judged.append(args[0].name)
        return subject(self, *args)

    monkeypatch.setattr(Evaluation, "subject", judge)
    assert main([*flags, "--stages", "evaluate"]) == 130
    assert judged == ["teacher, 30 steps", "causal start", "causal start", "student"]
    judged[:] = [""] * 5
    assert main([*flags, "--stages", "evaluate"]) == 0
    assert judged[5:] == ["student"] * 7
    assert (whole / "scores.json").read_text() == before
    judged.clear()
    assert main(flags) == 0
    assert judged == []
    (whole / "rows.json").write_text('{"mark')
    assert main(flags) == 1
    (whole / "rows.json").unlink()


def test_rows_of_another_student_are_not_taken_for_its_own(tmp_path: Path) -> None:
    scores = Scores({"total": 1 / 3}, {"total": [0.1, 0.7]})
    row = Row("student", FixedPlan(1, 4), 1, 12, 4, scores)
    KeptRows(tmp_path / "rows.json", "a").row("x", lambda: row)
    again, known = KeptRows(tmp_path / "rows.json", "a").row("x", lambda: replace(row, clips=5))
    assert known and again == row
    other, known = KeptRows(tmp_path / "rows.json", "b").row("x", lambda: replace(row, clips=5))
    assert not known and other.clips == 5
