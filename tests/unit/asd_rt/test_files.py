"""Folders and files of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from asd_rt.errors import OutputError
from asd_rt.files import make_folder


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_folder_that_cannot_be_made_is_named_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"--to .*file: cannot be made"):
        make_folder(tmp_path / "file", "--to")


def test_what_a_folder_holds_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("asd_rt.files.tempfile.TemporaryFile", full)
    with pytest.raises(OutputError, match=r"--out .*: folder .* cannot be written \(No space left"):
        make_folder(tmp_path)
