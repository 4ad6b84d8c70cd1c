"""Curves of a run: what is kept after an interruption, and the page."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asd_rt.errors import OutputError
from train.curves import CURVE, EVENTS, PAGE, POINTS, Curves, Line, lines_of, read_curve, write_page


def write(run: Path, stage: str, start: int, stop: int, steps: int = 10) -> None:
    with Curves(run, stage, start, steps) as curves:
        for step in range(start, stop):
            curves.add(step, 0.5, {"loss": 1.0 / (step + 1)})
        curves.flush()


def test_steps_that_run_again_are_recorded_once(tmp_path: Path) -> None:
    write(tmp_path, "teacher", 0, 10)
    write(tmp_path, "init", 0, 7)
    with (tmp_path / CURVE).open("a") as file:
        file.write('{"stage": "init", "st')  # the crash
    write(tmp_path, "init", 5, 10)
    steps = {
        stage: lines[0].steps for stage, lines in lines_of(read_curve(tmp_path / CURVE)).items()
    }
    assert steps == {"teacher": list(range(10)), "init": list(range(10))}
    for line in (tmp_path / CURVE).read_text().splitlines():
        json.loads(line)


def test_the_page_shows_stages_progress_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "samples_teacher_at_00004.png").write_bytes(b"")
    write(tmp_path, "teacher", 0, 4)
    page = (tmp_path / PAGE).read_text()
    assert "4 of 10 steps, 0 min left at 0.50 s a step" in page
    assert 'http-equiv="refresh"' in page
    assert 'src="samples_teacher_at_00004.png"' in page
    assert "http" not in re.sub("http-equiv", "", page)  # nothing from elsewhere
    for svg in re.findall(r"<svg.*?</svg>", page):
        ET.fromstring(svg.replace("class=raw", 'class="r"').replace("class=smooth", 'class="s"'))
    write(tmp_path, "teacher", 4, 10)
    page = (tmp_path / PAGE).read_text()
    assert "10 steps" in page
    assert 'http-equiv="refresh"' not in page


def test_a_long_curve_is_thinned(tmp_path: Path) -> None:
    records = [{"stage": "a", "step": i, "loss": float(i % 7)} for i in range(20 * POINTS)]
    write_page(tmp_path, records, {})
    points = re.findall(r'points="([^"]*)"', (tmp_path / PAGE).read_text())
    assert all(POINTS <= len(line.split()) <= POINTS + 2 for line in points)


def test_a_page_of_nothing(tmp_path: Path) -> None:
    write_page(tmp_path, [], {})
    assert "No step is done yet" in (tmp_path / PAGE).read_text()


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    write(tmp_path, "teacher", 0, 3)
    (file,) = (tmp_path / EVENTS).iterdir()
    data, found = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        body = data[12 : 12 + size]
        assert int.from_bytes(data[12 + size : 16 + size], "little") == masked_crc32c(body)
        event = Event.FromString(body)
        found += [(event.step, value.tag) for value in event.summary.value]
        data = data[16 + size :]
    assert found == [(step, "teacher/loss") for step in range(3)]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_smooth_lines_stay_between_the_extremes(values: list[float]) -> None:
    smooth = Line("x", range(len(values)), values).smooth()
    slack = 1e-9 * max(1.0, max(map(abs, values)))
    assert min(values) - slack <= min(smooth)
    assert max(smooth) <= max(values) + slack


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with Curves(tmp_path, "teacher", 0, 10) as curves:
        curves._lines.close()
        curves._lines = Path("/dev/full").open("a")  # noqa: SIM115 (Curves closes it)
        with pytest.raises(OutputError, match=r"No space left on device.*--resume") as caught:
            for step in range(10):
                curves.add(step, 0.5, {"loss": 1.0})
            curves.flush()
    assert "\n" not in str(caught.value)
