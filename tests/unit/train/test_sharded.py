"""Sharded checkpoints: whole or not there, and damage is told in one line."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from asd_rt.errors import CheckpointError
from train.parallel import SINGLE
from train.sharded import folders, load_sharded, read_mark, save_sharded


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"weights": {"a": torch.full((50_000,), value), "b": torch.full((3, 4), value)}}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more into a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_last_two_are_kept_and_read_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_sharded(tmp_path, "mark", step, state(step), SINGLE)
    assert [p.name for p in folders(tmp_path)] == ["step_00000002", "step_00000003"]
    mark = read_mark(folders(tmp_path)[-1])
    assert (mark["fingerprint"], mark["step"]) == ("mark", 3)
    found = state(0)
    load_sharded(folders(tmp_path)[-1], found)
    torch.testing.assert_close(found, state(3))
    part = {"weights": {"b": torch.zeros(3, 4)}}
    load_sharded(folders(tmp_path)[0], part)
    assert (part["weights"]["b"] == 2).all()


def test_a_full_disk_leaves_the_last_one_whole(tmp_path: Path) -> None:
    save_sharded(tmp_path, "mark", 1, state(1), SINGLE)
    with (
        files_of_at_most(100_000),
        pytest.raises(
            CheckpointError, match=r"step_00000002: cannot be saved .*is the disk full"
        ) as error,
    ):
        save_sharded(tmp_path, "mark", 2, state(2), SINGLE)
    assert "step_00000001 is intact" in str(error.value)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    found = state(0)
    load_sharded(folders(tmp_path)[-1], found)
    torch.testing.assert_close(found, state(1))
    save_sharded(tmp_path, "mark", 2, state(2), SINGLE)  # when there is room again
    assert len(folders(tmp_path)) == 2


def test_what_was_cut_short_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save_sharded(tmp_path, "mark", step, state(step), SINGLE)
    last = folders(tmp_path)[-1]
    (data,) = last.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="is no whole checkpoint") as error:
        read_mark(last)
    assert f"{len(whole) - 100} bytes, expected {len(whole)}" in str(error.value)
    assert "remove it to go on from step_00000001" in str(error.value)
    data.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_mark(last)
    (last / "mark.json").unlink()
    with pytest.raises(CheckpointError, match="is no whole checkpoint"):
        read_mark(last)


def test_what_is_still_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    save_sharded(tmp_path, "mark", 1, state(1), SINGLE)
    (tmp_path / "step_00000002.tmp").mkdir()
    assert [p.name for p in folders(tmp_path)] == ["step_00000001"]


def test_other_tensors_are_told(tmp_path: Path) -> None:
    save_sharded(tmp_path, "mark", 1, state(1), SINGLE)
    with pytest.raises(CheckpointError, match="is no whole checkpoint") as error:
        load_sharded(folders(tmp_path)[0], {"weights": {"c": torch.zeros(1)}})
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="is no whole checkpoint"):
        load_sharded(folders(tmp_path)[0], {"weights": {"b": torch.zeros(5, 5)}})
