"""What the hog benchmark says of a stream, on streams whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import asd_rt
from benchmarks.hog import any_prompt, main, markdown, spare_deadline_ms, summarise

DEADLINE_MS = 20.0


def row(steps: int, taken_ms: float, hog: bool = False) -> dict[str, Any]:
    missed = taken_ms > DEADLINE_MS
    return {"at_s": 0.0, "steps": steps, "taken_ms": taken_ms, "missed": missed, "hog": hog}


def test_misses_steps_and_recovery() -> None:
    calm, slow = [row(4, 12.0)] * 100, [row(4, 40.0, hog=True)] + [row(1, 15.0, hog=True)] * 9
    after = [row(1, 6.0)] * 3 + [row(4, 25.0)] + [row(4, 12.0)] * 96
    found = summarise([row(4, 70.0), *calm, *slow, *after], DEADLINE_MS)
    assert found["usual_steps"] == 4
    assert found["misses_outside"] == 0  # the late block is within the recovery
    assert found["misses_inside"] == 0.1
    assert found["steps_inside"] == 1.3
    assert found["recovery_blocks"] == 3
    assert found["pace_outside"] == 1.0
    assert abs(found["pace_inside"] - 10 * 20 / (40 + 9 * 20)) < 1e-9


def test_a_stream_without_a_hog() -> None:
    found = summarise([row(4, 70.0), *[row(4, 12.0)] * 99, row(4, 30.0)], DEADLINE_MS)
    assert found["steps_inside"] is None
    assert found["misses_outside"] == 0.01
    report = {
        "deadline_ms": DEADLINE_MS, "name": "toy", "seconds": 2, "hog_seconds": 1, "engine": "e",
        "device": "d", "command": "c", "summary": found,
        "machine": {"cores": 2, "cpu": "x", "load_average": [0.0]},
    }  # fmt: skip
    assert "| missed deadlines | 1.00% | 0.00% |" in markdown(report)


def test_the_deadline_leaves_room_for_all_steps() -> None:
    with asd_rt.open() as session:
        deadline_ms = spare_deadline_ms(session)
        taken = [
            block.block_ms for block in session.generate(any_prompt(session), frames=36, steps=4)
        ]
    assert deadline_ms > min(taken)


@pytest.mark.parametrize("deadline", ["0", "-1", "nan"])
def test_a_deadline_that_is_none_is_one_line(
    deadline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--deadline-ms={deadline}", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: deadline-ms must be a number above 0") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
