"""The contact sheet's layout."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.contact_sheet import CELL, PAGE, Row, draw_sheet, main, spread_over


def test_columns_reach_from_first_to_last_frame() -> None:
    assert spread_over(48, 5) == [0, 12, 24, 35, 47]
    assert spread_over(3, 9) == [0, 1, 2]
    assert spread_over(1, 4) == [0]


def test_frames_are_whole_squares_with_gutters_between() -> None:
    red = np.full((4, 32, 32, 3), (250, 10, 10), np.uint8)
    blue = np.full((4, 32, 32, 3), (10, 10, 250), np.uint8)
    sheet = np.asarray(draw_sheet([Row("red", red), Row("blue", blue)], 4, 16, "a note"))
    cell = 32 * -(-CELL // 32)
    for colour in ((250, 10, 10), (10, 10, 250)):
        mask = (sheet == colour).all(axis=-1)
        assert mask.sum() == 4 * cell * cell
        columns = mask.any(axis=0)
        starts = np.flatnonzero(np.diff(columns.astype(int)) == 1) + 1
        assert len(starts) == 4
        gap = starts[1] - 1
        assert (sheet[mask.any(axis=1)][:, gap] == PAGE).all()


def test_bad_columns_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--columns", "0"])
    assert caught.value.code == 2
    assert "--columns: must be >= 1" in capsys.readouterr().err


def test_a_missing_folder_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", "/no/such/sheet.png"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "mkdir -p /no/such" in lines[0]
