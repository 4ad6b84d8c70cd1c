"""What tests share between processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

MakeOnce = Callable[[str, Callable[[Path], object]], Path]


def test_a_folder_is_filled_once(make_once: MakeOnce) -> None:
    def fill(folder: Path) -> None:
        (folder / "file").write_text("made")

    folder = make_once("of_test_make_once", fill)
    assert make_once("of_test_make_once", lambda _: pytest.fail("filled again")) == folder
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("file", "made")]


def test_what_failed_is_tried_again_from_nothing(make_once: MakeOnce) -> None:
    def half(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_once("of_test_make_once_2", half)
    folder = make_once("of_test_make_once_2", lambda path: (path / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
